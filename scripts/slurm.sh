#!/usr/bin/env bash
# A training on Slurm that goes on after preemption and time limits: one task a node, torch.distributed.run in each.
#
#   sbatch --nodes=1 --gpus-per-node=8 scripts/slurm.sh projects/aurora/msrvtt_ret.yaml [KEY=VALUE ...]
#   sbatch --nodes=2 --gpus-per-node=4 --time=08:00:00 scripts/slurm.sh projects/aurora/coco_ret.yaml
#
# Partition, account, memory and processors (--cpus-per-task, of a node: those of all its processes and of what reads their
# data) are your cluster's: give them to sbatch. Run it from the repository root.
# GPUS: processes of a node (default: SLURM_GPUS_ON_NODE, or 1). PYTHON: interpreter (default: .venv/bin/python).
#SBATCH --job-name=aurora
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=aurora-%j.log
# Ten minutes before the time limit the run saves a checkpoint and the job goes back into the queue.
#SBATCH --signal=B:USR1@600
set -euo pipefail

usage="usage: sbatch [--nodes=N --gpus-per-node=N --time=HH:MM:SS ...] scripts/slurm.sh PROJECT.yaml [KEY=VALUE ...]"
case "${1:-}" in
    -h | --help) echo "$usage"; exit 0 ;;
    "" | -*) echo "$usage" >&2; exit 2 ;;
esac
project=$1
shift
if [ ! -f "$project" ]; then
    echo "slurm.sh: no file $project in $PWD; submit it from the repository root" >&2
    exit 2
fi
if ! command -v srun >/dev/null || ! command -v scontrol >/dev/null || ! command -v scancel >/dev/null; then
    echo "slurm.sh: srun, scontrol and scancel are not here: this is for a Slurm cluster; elsewhere run python train.py" >&2
    exit 2
fi
python=${PYTHON:-.venv/bin/python}
nodes=${SLURM_JOB_NUM_NODES:-1}
processes=${GPUS:-${SLURM_GPUS_ON_NODE:-1}}
# All are read: a pipe to head could end scontrol, and by pipefail this script, with a broken pipe.
hosts=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-$(hostname)}")
head=${hosts%%$'\n'*}
port=$((20000 + ${SLURM_JOB_ID:-0} % 20000))

requeued=0
requeue() {
    requeued=1
    echo "time is nearly up: the run saves, and job $SLURM_JOB_ID goes back into the queue"
    # SIGTERM lets the run save a checkpoint and end. Not by way of srun, which answers it by killing its tasks at once;
    # scancel sends it to the tasks of all nodes, and not to this script.
    # Where that fails, the run still goes on from its last 200 steps.
    scancel --signal=TERM "$SLURM_JOB_ID" || kill -TERM "$step" 2>/dev/null || true
}
trap requeue USR1

# An agent that is asked to end kills its processes after 30 seconds: a step and its checkpoint may take longer.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-540}
# Since Slurm 22.05 srun does not take --cpus-per-task from sbatch: the processes of a node would share one processor.
srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} "$python" -m torch.distributed.run \
    --nnodes="$nodes" --nproc_per_node="$processes" --rdzv_id="${SLURM_JOB_ID:-0}" \
    --rdzv_backend=c10d --rdzv_endpoint="$head:$port" \
    train.py --cfg-path "$project" --options run.resume=auto run.checkpoint_every=200 run.save_queue=true "$@" &
step=$!
status=0
wait "$step" || status=$?
if [ "$requeued" = 1 ]; then
    # The trap ended the first wait; this is the step's own end.
    wait "$step" || true
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"
