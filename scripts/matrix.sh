#!/usr/bin/env bash
# Runs the tests on the oldest and the newest Python, with the oldest and the newest dependencies that pyproject.toml
# allows. Arguments are passed to pytest. Environment variables select a part of the matrix:
#   PYTHONS="python3.11 python3.13"   DEPENDENCIES="oldest newest"   MATRIX=.matrix (about 7 GB per environment)
# Existing environments are updated. $MATRIX/NAME.txt lists what is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
matrix=${MATRIX:-.matrix}
pythons=${PYTHONS:-python3.11 python3.13}
mkdir -p "$matrix"

# Lower bounds as exact versions; the newest versions need no constraints.
"${pythons%% *}" - > "$matrix/oldest.txt" << 'END'
import re
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
requirements = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
for name, version in re.findall(r"^([\w-]+)(?:\[\w+\])?>=([\d.]+)", "\n".join(requirements), re.MULTILINE):
    if not name.startswith("types-"):  # only for mypy
        print(f"{name}=={version}")
END
: > "$matrix/newest.txt"

# run_tests NAME PYTHON CONSTRAINTS [ARGUMENT...]: makes or updates an environment, and runs pytest in it.
run_tests() {
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
        run_tests "$name" "$python" "$matrix/$dependencies.txt" "$@" || failed+=("$name")
    done
done
echo "failed: ${failed[*]:-none}"
[ ${#failed[@]} -eq 0 ]
