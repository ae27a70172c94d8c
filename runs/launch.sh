# Sourced by the launchers: `launch SCRIPT FLAGS...` runs a script of the repository with its output on the terminal and
# in $OUTPUT/logs.log and $OUTPUT/error.log, and ends with the script's exit code. Plain sh. Paths are taken from the
# directory you stand in.
#   PYTHON   interpreter (default: the repository's .venv, else python3)
#   NPROC    processes on this machine, one per GPU (default 1)
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   several machines; see train_several_machines.sh
REPOSITORY=$(cd "$(dirname "$0")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    if [ -x "$REPOSITORY/.venv/bin/python" ]; then PYTHON=$REPOSITORY/.venv/bin/python; fi
fi

# Copies its input to a file of $OUTPUT, too; a signal to the whole group must not end it before what writes to it.
keep() { trap '' INT TERM; exec tee -a "$OUTPUT/$1"; }

launch() {
    script=$REPOSITORY/$1
    shift
    if [ "${NNODES:-1}" -gt 1 ]; then
        set -- "$PYTHON" -m torch.distributed.run --nnodes="$NNODES" --nproc_per_node="${NPROC:-1}" \
            --node_rank="${NODE_RANK:?set NODE_RANK, 0 on the first machine}" \
            --master_addr="${MASTER_ADDR:?set MASTER_ADDR to the address of the first machine}" \
            --master_port="${MASTER_PORT:-29400}" "$script" "$@"
    elif [ "${NPROC:-1}" -gt 1 ]; then
        set -- "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$NPROC" "$script" "$@"
    else
        set -- "$PYTHON" "$script" "$@"
    fi
    mkdir -p "$OUTPUT" || exit 1
    code_file=$(mktemp)
    # Standard output goes to one tee, standard error (through descriptor 3) to another, the exit code into a file.
    exec 4>&1
    { { "$@" 2>&3 3>&- 4>&-; echo $? > "$code_file"; } | keep logs.log >&4; } 3>&1 4>&4 \
        | keep error.log >&2
    exec 4>&-
    code=$(cat "$code_file")
    rm -f "$code_file"
    exit "${code:-1}"
}
