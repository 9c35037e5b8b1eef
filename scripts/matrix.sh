#!/usr/bin/env bash
# The test suite on the oldest and the newest Python, with the oldest and the newest dependencies that pyproject.toml
# allows. What follows is passed to pytest; environment variables choose a part of it:
#   PYTHONS="python3.11 python3.13"   DEPENDENCIES="oldest newest"   MATRIX=.matrix (about 7 GB an environment)
set -euo pipefail
cd "$(dirname "$0")/.."
matrix=${MATRIX:-.matrix}
pythons=${PYTHONS:-python3.11 python3.13}
mkdir -p "$matrix"

# Lower bounds as exact versions; the newest need no file of constraints.
"${pythons%% *}" - > "$matrix/oldest.txt" << 'END'
import re
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
requirements = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
for name, version in re.findall(r"^([\w-]+)(?:\[\w+\])?>=([\d.]+)", "\n".join(requirements), re.MULTILINE):
    if not name.startswith("types-"):  # for mypy alone
        print(f"{name}=={version}")
END
: > "$matrix/newest.txt"

failed=()
for python in $pythons; do
    for dependencies in ${DEPENDENCIES:-oldest newest}; do
        name=$(basename "$python")-$dependencies
        bin=$matrix/$name/bin
        echo "== $name"
        [ -x "$bin/python" ] || "$python" -m venv "$matrix/$name"
        "$bin/python" -m pip install --quiet --disable-pip-version-check -e ".[dev]" \
            --upgrade --constraint "$matrix/$dependencies.txt"
        "$bin/python" -m pip freeze --exclude-editable > "$matrix/$name.txt"
        "$bin/python" -m pytest "$@" || failed+=("$name")
    done
done
echo "failed: ${failed[*]:-none}"
[ ${#failed[@]} -eq 0 ]
