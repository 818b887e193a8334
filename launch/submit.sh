#!/usr/bin/env bash
# Submit a pretraining job:  launch/submit.sh CLUSTER MODEL --nodes N [options] [flags of `slope pretrain`]
#
#   CLUSTER              a name in launch/clusters, or the path of an .env file
#   MODEL                a name in launch/models, or the path of a .yaml file
#   --nodes N            nodes of the job
#   --time D-HH:MM:SS    time limit (default: the site's longest)
#   --out FOLDER         run folder, on a file system that all nodes see (default: runs/MODEL-CLUSTER)
#   --account NAME       account to charge (or set SBATCH_ACCOUNT)
#   --partition NAME     partition (default: the cluster file's)
#   --launcher NAME      srun, torchrun, deepspeed or mpirun (default: the cluster file's)
#   --exclude NODES      nodes to avoid, as `slope preflight` prints them
#   --signal-seconds S   warn the job S seconds before its time is up (default 300; a checkpoint and a step must fit)
#   --chain K            K jobs, one after the other, for sites that do not let a job requeue itself
#   --no-preflight       start without looking at the nodes first
#   --sbatch OPTION      one more option for sbatch (may be given again)
#   --dry-run            print the sbatch line and the layout, submit nothing
#   --test-only          let SLURM check the request, submit nothing
#
# Everything else goes to `slope pretrain` as it is: --data corpus --steps 1000 --global-batch-size 512 ...
# The layout is `slope plan`'s, unless --tensor-parallel and the like fix it. Bad input is refused here.
set -euo pipefail

die() {
  echo "submit: error: $*" >&2
  exit 2
}

root=$(cd "$(dirname "$0")/.." && pwd)
for word in "$@"; do
  case $word in -h | --help)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"
    exit 0
    ;;
  esac
done
[ $# -ge 2 ] || die "give CLUSTER and MODEL, as in: launch/submit.sh narval opt-66b --nodes 8 --data corpus; see --help"
cluster=$1 model=$2
shift 2

data='' nodes='' time='' out='' account=${SBATCH_ACCOUNT:-} partition='' launcher='' exclude='' seconds=300 chain=1
preflight=yes mode=submit extra=() flags=()
while [ $# -gt 0 ]; do
  case $1 in
    --nodes | --time | --out | --account | --partition | --launcher | --exclude | --signal-seconds | --chain | --sbatch)
      [ $# -ge 2 ] || die "$1 needs a value; see --help"
      case $1 in
        --nodes) nodes=$2 ;;
        --time) time=$2 ;;
        --out) out=$2 ;;
        --account) account=$2 ;;
        --partition) partition=$2 ;;
        --launcher) launcher=$2 ;;
        --exclude) exclude=$2 ;;
        --signal-seconds) seconds=$2 ;;
        --chain) chain=$2 ;;
        --sbatch) extra+=("$2") ;;
      esac
      shift 2
      ;;
    --no-preflight) preflight=no; shift ;;
    --dry-run) mode=dry; shift ;;
    --test-only) mode='test'; shift ;;
    --data) data=${2:-} flags+=("$1"); shift ;;
    *) flags+=("$1"); shift ;;
  esac
done

# -- what is asked for, checked before any node is ---------------
case $cluster in *.env) file=$cluster ;; *) file=$root/launch/clusters/$cluster.env ;; esac
case $model in *.yaml) config=$model ;; *) config=$root/launch/models/$model.yaml ;; esac
[ -f "$file" ] || die "cluster '$cluster' has no file $file: use one of $(cd "$root/launch/clusters" && echo *.env)"
[ -f "$config" ] || die "model '$model' has no file $config: use one of $(cd "$root/launch/models" && echo *.yaml)"
# shellcheck source=/dev/null
. "$file"
for pair in "--nodes $nodes" "--signal-seconds $seconds" "--chain $chain"; do
  [[ ${pair#* } =~ ^[1-9][0-9]*$ ]] || die "${pair%% *} is '${pair#* }': it must be a number from 1 on; see --help"
done
launcher=${launcher:-$LAUNCHER} partition=${partition:-$PARTITION} time=${time:-$MAX_TIME}
case $launcher in
  srun | torchrun | deepspeed | mpirun) ;;
  *) die "--launcher is '$launcher': it must be srun, torchrun, deepspeed or mpirun" ;;
esac
# As sbatch has it: minutes, minutes:seconds, hours:minutes:seconds, days-hours and so on.
[[ $time =~ ^([0-9]+(:[0-9]+){0,2}|[0-9]+-[0-9]+(:[0-9]+){0,2})$ ]] ||
  die "--time is '$time': it must be a time as sbatch takes it, such as 12:00:00 or 2-00:00:00"
[ "$ACCOUNT_REQUIRED" = no ] || [ -n "$account" ] || [ "$mode" = dry ] ||
  die "$(basename "$file" .env) charges jobs to an account: give --account NAME, or set SBATCH_ACCOUNT"
[ "$mode" = dry ] || command -v sbatch > /dev/null ||
  die "there is no sbatch on this machine: submit from a login node, or look at the request with --dry-run"
[ "$mode" != submit ] || [ -z "$data" ] || [ -f "$data/manifest.json" ] ||
  die "--data $data holds no prepared data: write it here, on a login node, with slope data prepare SOURCE --out $data"

# The environment beside the code, unless another is active. The same one serves the job (pretrain.sbatch).
venv=${SLOPE_VENV:-$root/.venv}
[ ! -x "$venv/bin/python" ] || PATH=$venv/bin:$PATH
slope() { PYTHONPATH=$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH} python -m slope_megatron "$@"; }
python -c 'import yamlcore' 2> /dev/null ||
  die "no python with this project's requirements: activate the environment, or make one (README.md), or set SLOPE_VENV"
name=$(basename "$config" .yaml)-$(basename "$file" .env)
out=$(realpath -m "${out:-$root/runs/$name}")
config=$(realpath "$config") file=$(realpath "$file")
# The site's type of parameters (bf16; fp16 on V100), unless a flag says another.
layout=$(
  slope plan --dtype "$DTYPE" --cluster "$file" --nodes "$nodes" --config "$config" "${flags[@]}" --flags
) || exit 2
read -ra layout <<< "$layout"

# -- the job ---------------
job=$out.job
read -ra site <<< "$SBATCH_ARGS"
command=(
  sbatch --parsable --export=ALL --requeue --open-mode=append "--signal=B:USR1@$seconds"
  --job-name="$name" --nodes="$nodes" --ntasks-per-node="$GPUS_PER_NODE" --time="$time"
  --cpus-per-task=$((CPUS_PER_NODE / GPUS_PER_NODE)) --output="$job/job-%j.log" "${site[@]}"
)
[ -z "$account" ] || command+=(--account="$account")
[ -z "$partition" ] || command+=(--partition="$partition")
[ -z "$exclude" ] || command+=(--exclude="$exclude")
[ "$chain" = 1 ] || command+=(--dependency=singleton)
[ "$mode" != test ] || command+=(--test-only)
command+=(
  "${extra[@]}" "$root/launch/pretrain.sbatch" "$root" "$file" "$launcher" "$preflight" "$out"
  --config "$config" --dtype "$DTYPE" "${layout[@]}" "${flags[@]}"
)
if [ "$mode" = dry ]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
[ "$mode" = test ] && exec "${command[@]}"
mkdir -p "$job"
rm -f "$job/stop"
for ((number = 1; number <= chain; number++)); do
  id=$("${command[@]}")
  echo "job ${id%%;*}: run folder $out, log $job/job-${id%%;*}.log"
done
echo "watch: squeue --me; tail -f $job/job-*.log"
echo "save and stop: touch $job/stop; scancel --signal=USR1 --batch JOB"
echo "resume: this command again    end now: scancel JOB"
