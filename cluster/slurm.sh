#!/usr/bin/env bash
# A merge on the nodes of a Slurm job: sbatch --nodes 4 cluster/slurm.sh recipe.yaml /shared/merged [OPTION OF pcb-ray merge...]
# It may be requeued, or submitted again, at any time: --resume starts, goes on or finds it done. Lines to edit are marked EDIT.
#SBATCH --job-name=pcb-ray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
# EDIT above: nodes and time. --exclusive and --mem=0 are needed: `ray symmetric-run` refuses to start where a Ray runs, and ends by
# `ray stop`, which ends every Ray of yours on the node. --signal asks for a signal two minutes before the time is up.
set -euo pipefail
[ $# -ge 2 ] || { echo "$0: wanted RECIPE and OUT, found $# arguments. Fix: sbatch $0 recipe.yaml /shared/merged" >&2; exit 2; }
# EDIT: whatever makes `ray` and `pcb-ray` known on all nodes, such as: source /shared/pcb-ray/bin/activate

# symmetric-run wants an address of the head that no host takes for its own loopback; many have their own name as 127.0.1.1.
: "${HEAD_IP:=$(hostname -I | tr ' ' '\n' | grep -vE '^127\.|:' | head -n 1)}" # EDIT: export HEAD_IP for another network of this node
address=$HEAD_IP:$((20000 + SLURM_JOB_ID % 10000)) # not 6379, which others may use

# A token for this job alone, in the environment of its steps: never in a file or on a command line.
RAY_AUTH_TOKEN=$(python3 -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=${RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT:-600} # by default 30 s, for all nodes to come
export RAY_TMPDIR=${RAY_TMPDIR:-/tmp} RAY_USAGE_STATS_ENABLED=0
unset RAY_ADDRESS
ulimit -n "$(ulimit -Hn)"

# symmetric-run ends with 0 when a `ray start` failed, so its exit code is not believed: the command writes its own.
ended=$(mktemp)
trap 'rm -f "$ended"' EXIT
requeue() { # the time is up, nearly: what is done is kept, and the next run goes on
    echo "$0: out of time; back into the queue" >&2
    scontrol requeue "$SLURM_JOB_ID"
}
trap requeue USR1

srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 \
    ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" --num-cpus "$SLURM_CPUS_ON_NODE" \
    --object-store-memory 1000000000 -- \
    bash -c 'ended=$1; shift; "$@" && code=0 || code=$?; echo $code > "$ended"; exit $code' run "$ended" \
    pcb-ray merge "$@" --resume --address "$address" &
steps=$!
wait $steps && code=0 || code=$?
while kill -0 $steps 2> /dev/null; do # a signal ends `wait`, not the steps
    wait $steps && code=0 || code=$?
done
if [ -s "$ended" ]; then
    exit "$(cat "$ended")"
fi
echo "$0: wanted the merge to run, found that it never started or never ended (srun ended with $code). Fix: above is why; if nodes" \
    "came late, raise RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT." >&2
exit $((code > 0 ? code : 1))
