#!/usr/bin/env bash
# A Ray cluster on this machine for as long as its jobs take: a head that runs nothing and two nodes, on free ports, with a token of
# its own. Other Rays here are left alone. The dashboard, which takes the jobs, is on 127.0.0.1; the rest of Ray listens wherever Ray
# does, which is what the token is for.
#   bash cluster/local.sh                        tries it out: a small family of models is made, merged, verified and searched
#   bash cluster/local.sh FOLDER COMMAND...      submits each COMMAND as a job with FOLDER as its working folder, one after another:
#                                                bash cluster/local.sh . "pcb-ray merge recipe.yaml /shared/merged"
# Ends with 0 if all jobs succeeded, with 1 at the first that doesn't. At the end, after a failure and after Ctrl-C (which stops the
# job) all processes that it started and all files that Ray made are gone; outputs, and what --resume needs of them, stay.
# CPUS is the number of cores of each node (by default half of the machine's), OBJECT_STORE the bytes of its object store.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
for program in ray pcb-ray setsid; do
    command -v "$program" > /dev/null && continue
    echo "$0: wanted $program on PATH, found none. Fix: pip install '.[cluster,search]' and activate its environment." >&2
    exit 2
done
if [ $# -eq 1 ]; then
    echo "$0: wanted FOLDER and at least one COMMAND, or nothing, found only $1. Fix: quote each command: $0 . 'pcb-ray merge ...'." >&2
    exit 2
fi
cores=$(nproc)
cpus=${CPUS:-$((cores > 1 ? cores / 2 : 1))}
store=${OBJECT_STORE:-80000000}
memory=$(awk '/^MemAvailable/ {printf "%d", $2 * 1024 * 0.35}' /proc/meminfo) # for the workers of one node

umask 077
folder=$(mktemp -d /tmp/pcb.XXXXXX) # a short path: Ray's sockets lie below it
export RAY_TMPDIR=$folder RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$folder/token
unset RAY_ADDRESS RAY_AUTH_TOKEN
nodes=() client='' job=''

ours() { # what lives in the sessions of the nodes, and what carries their mark elsewhere: jobs are sessions of their own
    {
        [ ${#nodes[@]} -eq 0 ] || pgrep -s "$(IFS=, && echo "${nodes[*]}")" || true
        grep -lsz "^PCB_RAY_LOCAL=$folder\$" /proc/[0-9]*/environ | cut -d/ -f3 || true
    } | sort -u
}

finish() {
    code=$?
    trap '' INT TERM HUP # once is enough
    trap - EXIT
    [ -z "$client" ] || kill "$client" 2> /dev/null || true
    if [ -n "$job" ]; then
        echo "$0: stopping the job" >&2
        timeout 60 ray job stop --address "$dashboard" "$job" > /dev/null 2>&1 || true
    fi
    [ ${#nodes[@]} -eq 0 ] || kill "${nodes[@]}" 2> /dev/null || true # each ends what it started
    for _ in $(seq 200); do
        mapfile -t left < <(ours)
        [ ${#left[@]} -gt 0 ] || break
        sleep 0.2
    done
    while [ ${#left[@]} -gt 0 ]; do
        kill -KILL "${left[@]}" 2> /dev/null || true
        sleep 0.1
        mapfile -t left < <(ours)
    done
    rm -rf "$folder"
    exit "$code"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

free_ports() {
    python3 -c '
import socket, sys
sockets = [socket.socket() for _ in range(int(sys.argv[1]))]
for one in sockets:
    one.bind(("127.0.0.1", 0))
print(*(one.getsockname()[1] for one in sockets))' "$1"
}

start() { # NAME OPTION...
    local agent agent_grpc metrics environments log=$folder/$1.log
    read -r agent agent_grpc metrics environments < <(free_ports 4)
    PCB_RAY_LOCAL=$folder setsid ray start --block --disable-usage-stats --node-ip-address 127.0.0.1 \
        --object-store-memory "$store" --dashboard-agent-listen-port "$agent" --dashboard-agent-grpc-port "$agent_grpc" \
        --metrics-export-port "$metrics" --runtime-env-agent-port "$environments" --min-worker-port 0 --max-worker-port 0 \
        "${@:2}" < /dev/null > "$log" 2>&1 &
    nodes+=($!)
}

await() { # NUMBER: until that many nodes are alive
    for _ in $(seq 60); do
        [ "$(ray list nodes --address "$dashboard" 2> /dev/null | grep -c ALIVE)" != "$1" ] || return 0
        kill -0 "${nodes[@]}" 2> /dev/null || break
        sleep 1
    done
    tail -n 20 "$folder"/*.log >&2
    echo "$0: wanted $1 nodes of Ray, found that they do not start. Fix: their logs above tell why." >&2
    exit 1
}

submit() { # FOLDER COMMAND: as a job, followed to its end
    local words state
    eval "words=($2)"
    job=pcb-$$-$RANDOM
    echo "$0: $2"
    ray job submit --address "$dashboard" --submission-id "$job" --working-dir "$1" -- "${words[@]}" &
    client=$!
    wait "$client" || true # it ends with 0 for a job that was stopped, too
    client=''
    state=$(ray job status --address "$dashboard" "$job" 2>&1 | grep -oE "succeeded|failed|stopped" | head -n 1 || true)
    [ -z "$state" ] || job=''
    [ "$state" = succeeded ] && return
    echo "$0: wanted a job that succeeds, found it ${state:-lost}: $2. Fix: its last lines above tell why." >&2
    exit 1
}

python3 -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH"
read -r gcs web client_server < <(free_ports 3)
dashboard=http://127.0.0.1:$web
echo "$0: starting a head and two nodes of $cpus CPUs each; dashboard $dashboard"
start head --head --port "$gcs" --dashboard-host 127.0.0.1 --dashboard-port "$web" --ray-client-server-port "$client_server" \
    --temp-dir "$folder" --num-cpus 0
await 1
# One after the other: two that start at once want the same names of sockets. Each with a folder of its own: the agents of nodes that
# share one unpack a job's working directory over each other.
for number in 1 2; do
    start "node$number" --address "127.0.0.1:$gcs" --temp-dir "$folder/$number" --num-cpus "$cpus" --memory "$memory"
    await $((number + 1))
done
if [ $# -gt 0 ]; then
    for command in "${@:2}"; do
        submit "$1" "$command"
    done
else
    python3 "$here/tryout.py" "$folder/try"
    submit "$folder/try/job" "pcb-ray merge recipe.yaml $folder/try/merged"
    submit "$folder/try/job" "pcb-ray verify $folder/try/merged"
    submit "$folder/try/job" "pcb-ray search recipe.yaml $folder/try/best"
    echo "$0: a merge, its verification and a search went through; all that they left will be removed"
fi
