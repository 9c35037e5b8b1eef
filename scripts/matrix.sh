#!/usr/bin/env bash
# The test suite on the oldest and the newest Python, with the oldest and the newest dependencies that pyproject.toml
# allows. What follows is passed to pytest; environment variables choose a part of it:
#   PYTHONS="python3.11 python3.13"   DEPENDENCIES="oldest newest"   MATRIX=.matrix (about 7 GB an environment)
# An environment that is there is brought up to date. What was installed in it is listed in $MATRIX/NAME.txt.
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

# Makes or updates an environment, and tests in it: its name, its Python, its constraints, arguments of pytest.
tested() {
    local environment=$matrix/$1 python=$2 constraints=$3
    local bin=$environment/bin
    shift 3
    { [ -x "$bin/pip" ] || "$python" -m venv --clear "$environment"; } &&
        "$bin/python" -m pip install --quiet --disable-pip-version-check -e ".[dev]" \
            --upgrade --upgrade-strategy eager --constraint "$constraints" &&
        "$bin/python" -m pip freeze --exclude-editable > "$environment.txt" &&
        "$bin/python" -m pytest "$@"
}

failed=()
for python in $pythons; do
    for dependencies in ${DEPENDENCIES:-oldest newest}; do
        name=$(basename "$python")-$dependencies
        echo "== $name"
        tested "$name" "$python" "$matrix/$dependencies.txt" "$@" || failed+=("$name")
    done
done
echo "failed: ${failed[*]:-none}"
[ ${#failed[@]} -eq 0 ]
