#!/usr/bin/env bash
# N processes of `lmtrain run ARGS` on this machine, as on N hosts, started again when one of them is lost.
#
#   launch/local.sh 2 --config experiments/pretrain.py:1m,steps=30 --workdir runs/two
#   launch/local.sh --dry-run 2 ...      prints the commands
#
# DEVICES=4   fake CPU devices of each process (default 1; 0: the machine's own devices, all for each process)
# RESTARTS=5  how often all are started again; not after 0 (done), 2 (refused) or a signal to this script
# BACKOFF=1   seconds before the first restart; doubled each time, at most 60
# PYTHON=...  the interpreter that has lmtrain (default: .venv/bin/python beside this folder, else python3)
#
# SIGTERM and Ctrl-C are passed on: all save the same step, and the exit status is 75. See docs/hosts.md.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[[ -x $python ]] || python=python3
exec "$python" -m lmtrain.hosts.local "$@"
