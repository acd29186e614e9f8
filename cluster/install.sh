#!/usr/bin/env bash
# Makes a virtual environment with pcb-ray, what jobs and searches need, and the versions that go together (constraints.txt):
#   bash cluster/install.sh FOLDER [cpu|cuda]        then: source FOLDER/bin/activate
# cpu (the default) takes torch's builds without CUDA where its index can be reached (TORCH_INDEX names another one); cuda takes
# what the package index has, which on Linux is the build with CUDA. Needs Python 3.11 (PYTHON names one), and a C compiler for the
# fast kernel. Takes some minutes and 2 GB of disk (cpu) or 7 GB (cuda).
set -euo pipefail
[ $# -ge 1 ] || { echo "$0: wanted FOLDER, found no argument. Fix: bash $0 .venv" >&2; exit 2; }
device=${2:-cpu}
here=$(cd "$(dirname "$0")" && pwd)
case $device in
    cpu) options=(--index-url "${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}") ;;
    cuda) options=() ;;
    *) echo "$0: wanted cpu or cuda, found $device. Fix: bash $0 $1 cpu" >&2; exit 2 ;;
esac
"${PYTHON:-python3}" -m venv "$1"
install() { "$1/bin/python" -m pip install --disable-pip-version-check --quiet -c "$here/constraints.txt" "${@:2}"; }
install "$1" "${options[@]}" "$(grep '^torch==' "$here/constraints.txt")"
install "$1" "$here/..[cluster,search]" boto3 # boto3: for the head of `ray up`
