"""Mistakes on the command line in one line each. tyro draws a box of several lines."""

from __future__ import annotations

import re

NUMBERS = {"int": "a whole number", "float": "a number"}


def one_line(box: str, command: str) -> str:
    """What a box of tyro says: what was got, what was expected, and where to look.

    Args:
        box: as it is printed, with letters in place of lines where a terminal has none.
        command: that was called, such as `cogvideo generate`.
    """
    text = " ".join(re.sub(r"[│╭╮╰╯─]|-{4,}", " ", box).split())
    text, _, _ = text.partition(" For full helptext")
    if found := re.search(r"Missing value for argument '(.*)'\. Expected 1 values", text):
        return f"{found[1]} has no value, expected one behind it"
    if found := re.search(r"Unrecognized options: (\S+?),? .*Perhaps you meant: (--[\w-]+)", text):
        return f"unknown option {found[1]}, did you mean {found[2]}?"
    if found := re.search(r"Value error .*?Error parsing (?:[\w.]+: )?(.*)", text):  # an option's name stays
        return _value(found[1])
    if found := re.search(r"invalid choice '(.*)' for argument '(.*)'\. Expected one of \((.*)\)", text):
        return f"{found[2]} is {found[1]!r}, expected {found[3].replace(chr(39), '').rstrip(',')}"
    if "Missing from" in text:
        names = re.findall(r"^(?:│| ) {5}(-\S+|[A-Z]\S*)", box, re.MULTILINE)
        return f"missing: {', '.join(names)}; `{command} --help` explains them"
    if found := re.search(r"Unrecognized options: (-[^-].*)", text):
        return f"unknown option {found[1]}; texts that begin with a dash stand at the end, behind --"
    found = re.search(r"Unrecognized options: (.*)", text)
    told = text if found is None else f"unknown {'option' if found[1][0] == '-' else 'argument'} {found[1]}"
    return f"{told}; `{command} --help` lists what there is"


def _value(told: str) -> str:
    """Without the words of Python for what is no number."""
    option, _, rest = told.partition(": ")
    if found := re.match(r"Could not find valid parse for arguments: \[(.*?)\] Argument helptext: \S+ (.*?\]+) ", rest):
        return f"{option} is {found[1]}, expected {found[2]}"
    for pattern in (
        r"no type matching \{None\}\|(?P<kind>INT|FLOAT) could be instantiated from \['(?P<got>.*?)'\]",
        r"invalid literal for (?P<kind>int)\(\) with base 10: '(?P<got>.*)'",
        r"could not convert string to (?P<kind>float): '(?P<got>.*)'",
    ):
        if found := re.match(pattern, rest):
            return f"{option} is {found['got']!r}, expected {NUMBERS[found['kind'].lower()]}"
    return told
