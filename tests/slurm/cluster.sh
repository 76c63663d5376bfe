#!/usr/bin/env bash
# cluster.sh - a private, throw-away, REAL Slurm cluster on one machine (Debian 12 packages), for the tests of this folder.
#
#   cluster.sh install          apt-get install what is missing (root)
#   cluster.sh up N             bring up slurmctld + N compute nodes (idempotent)
#   cluster.sh down             take everything down (idempotent)
#   cluster.sh status           rc 0: all up; rc 3: not (all) up
#   cluster.sh env              print 'export ...' lines for client commands: eval "$(... env)"
#   cluster.sh run CMD...       run CMD with that environment
#   cluster.sh exec I CMD...    run CMD on node I (inside its namespaces)
#   cluster.sh kill-node I      power failure: SIGKILL everything on node I
#   cluster.sh start-node I     boot it again
#   cluster.sh kill-slurmd I    SIGKILL only slurmd of node I (steps live on)
#   cluster.sh restart-slurmd I start slurmd again on a node that is up
#   cluster.sh partition I | heal I   unplug/replug the node's network (netns mode)
#
# Environment:
#   SLURM_LAB_DIR      private directory (config, munge key, spool, state, logs, pids). Default: slurm-lab in TMPDIR
#   SLURM_LAB_MODE     netns | ports | auto (default).  netns: every node has its own net/uts/pid/ipc/mount
#                      namespace, hostname, IP and port space (needs CAP_SYS_ADMIN+CAP_NET_ADMIN).
#                      ports: all slurmd in the host's namespaces on 127.0.0.1, one port each (works unprivileged).
#   SLURM_LAB_CPUS     CPUs pretended per node (default 4); real cores may be fewer
#   SLURM_LAB_GPUS     fake GPUs per node (default 0; gres/gpu with /dev/null-like files)
#   SLURM_LAB_PRIVATE  colon-separated dirs that are node-local (each node sees its own empty copy; netns mode)
#   SLURM_LAB_ACCT     1: a private MariaDB + slurmdbd, so that sacct/sacctmgr work (+4 s, +150 MB; needs
#                      'SLURM_LAB_ACCT=1 cluster.sh install'). Without it: 'sacct -c' and 'scontrol show job'
#   SLURM_LAB_PREFIX   node name prefix (default "node")
#   SLURM_LAB_CONF_EXTRA  slurm.conf lines, one per line; they replace what is set below (e.g. 'KillWait=30')
#   SLURM_LAB_TIMEOUT  seconds to wait for all nodes to be idle (default 30)
set -Eeuo pipefail
export LC_ALL=C PATH="$PATH:/usr/sbin:/sbin:/usr/local/sbin"
SELF=$(readlink -f "${BASH_SOURCE[0]}")
LAB=$(realpath -m "${SLURM_LAB_DIR:-${TMPDIR:-/tmp}/slurm-lab}")
ETC=$LAB/etc RUN=$LAB/run LOG=$LAB/log
PREFIX=${SLURM_LAB_PREFIX:-node}

say() { printf 'slurm-lab: %s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

# ---- pid files: "pid starttime"; a recycled pid or a zombie never counts as ours -------------------------
p_start() { local s; { read -r s <"/proc/$1/stat"; } 2>/dev/null || return 1
            s=${s##*) }; set -- $s; [ "$1" != Z ] && [ "$1" != X ] || return 1; printf '%s\n' "${20}"; }
p_save()  { local st; st=$(p_start "$2") || return 1; printf '%s %s\n' "$2" "$st" >"$RUN/$1.pid"; }
p_of()    { local p s; { read -r p s <"$RUN/$1.pid"; } 2>/dev/null || return 1
            [ "$(p_start "$p" || true)" = "$s" ] && printf '%s\n' "$p"; }
p_stop()  { # name [signal=TERM] : signal, wait, then KILL
  local p i; p=$(p_of "$1") || { rm -f "$RUN/$1.pid"; return 0; }
  kill -"${2:-TERM}" "$p" 2>/dev/null || true
  for i in $(seq 50); do p_of "$1" >/dev/null || { rm -f "$RUN/$1.pid"; return 0; }; sleep 0.1; done
  kill -KILL "$p" 2>/dev/null || true
  for i in $(seq 50); do p_of "$1" >/dev/null || { rm -f "$RUN/$1.pid"; return 0; }; sleep 0.1; done
  say "could not stop $1 (pid $p)"; return 1
}
# start NAME LOGFILE CMD... : detached from the terminal, stdin and every inherited pipe/lock; remembers the pid
start() {
  local name=$1 log=$2 pid; shift 2
  ( for fd in /proc/self/fd/*; do fd=${fd##*/}; [ "$fd" -gt 2 ] && eval "exec $fd>&-"; done 2>/dev/null
    exec setsid "$@" ) </dev/null >>"$log" 2>&1 &
  pid=$!; disown "$pid"
  p_save "$name" "$pid" || die "$name died at once; see $log"
}
free_port() { # is TCP port $1 free to listen on in this network namespace?
  local h; h=$(printf ':%04X' "$1"); ! awk -v h="$h" '$2 ~ h"$" && $4=="0A"{f=1} END{exit !f}' /proc/net/tcp /proc/net/tcp6 2>/dev/null; }
wait_for() { local end=$((SECONDS+$1+1)); shift; while :; do "$@" && return 0; [ $SECONDS -lt $end ] || return 1; sleep 0.05; done; }

# ---- install ------------------------------------------------------------------------------------------------
cmd_install() {
  local need=()
  command -v slurmctld >/dev/null || need+=(slurmctld)
  command -v slurmd    >/dev/null || need+=(slurmd)
  command -v sbatch    >/dev/null || need+=(slurm-client)
  command -v munged    >/dev/null || need+=(munge)
  command -v ip        >/dev/null || need+=(iproute2)
  command -v nsenter   >/dev/null || need+=(util-linux)
  if [ "${SLURM_LAB_ACCT:-0}" = 1 ]; then
    command -v slurmdbd >/dev/null || need+=(slurmdbd); command -v mariadbd >/dev/null || need+=(mariadb-server); fi
  [ ${#need[@]} = 0 ] && { say "already installed: $(slurmd -V)"; return; }
  [ "$(id -u)" = 0 ] || die "missing ${need[*]}; run 'install' as root"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq </dev/null
  apt-get install -y -qq --no-install-recommends "${need[@]}" </dev/null
}

# ---- mode ---------------------------------------------------------------------------------------------------
netns_ok() { unshare --net --uts --mount --pid --ipc --fork sh -c 'mount -t proc proc /proc && hostname x &&
   ip link add br0 type bridge && ip link add v0 type veth peer name v1' >/dev/null 2>&1 </dev/null; }
pick_mode() {
  case ${SLURM_LAB_MODE:-auto} in
    netns) netns_ok || die "network namespaces are not usable here"; echo netns;;
    ports) echo ports;;
    auto)  if netns_ok; then echo netns; else echo ports; fi;;
    *) die "SLURM_LAB_MODE must be netns, ports or auto";;
  esac
}

# ---- configuration --------------------------------------------------------------------------------------------
write_conf() {
  local n=$1 mode=$2 i k base user head addr
  user=$(id -un); head=$(hostname -s 2>/dev/null || hostname)
  mkdir -p "$ETC" "$RUN" "$LOG" "$LAB/munge" "$LAB/state" "$LAB/spool"
  chmod 755 "$LAB" "$ETC" "$RUN" "$LOG" "$LAB/spool"; chmod 711 "$LAB/munge"; chmod 700 "$LAB/state"
  if [ ! -s "$LAB/munge/munge.key" ]; then
    ( umask 077; head -c 1024 /dev/urandom >"$LAB/munge/munge.key" ); chmod 400 "$LAB/munge/munge.key"; fi
  # a subnet and ports nobody uses here
  k=$(( $(cksum <<<"$LAB" | cut -d' ' -f1) % 250 + 1 ))
  if [ "$mode" = netns ]; then
    for i in $(seq 250); do ip -4 -o addr show | grep -q "inet 10\.213\.$k\." || ip route show | grep -q "^10\.213\.$k\." || break; k=$((k%250+1)); done
    addr=10.213.$k.254
  else addr=127.0.0.1; fi
  base=$((21000 + k*40))
  for i in $(seq 250); do
    local ok=1 p; for p in $(seq $base $((base+n+2))); do free_port "$p" || ok=0; done
    [ $ok = 1 ] && break; base=$((base+40)); [ $base -lt 31900 ] || base=21000; done
  printf '%s\n' "MODE=$mode" "N=$n" "K=$k" "ADDR=$addr" "BASE=$base" "HEAD=$head" "PREFIX=$PREFIX" "PRIVATE=$(printf %q "${SLURM_LAB_PRIVATE:-}")" >"$LAB/lab.env"

  { echo "127.0.0.1 localhost"; echo "$addr head $head"
    for i in $(seq "$n"); do echo "$(node_addr $i "$mode" "$k") $PREFIX$i"; done; } >"$ETC/hosts"

  echo "# no DNS on the compute nodes" >"$ETC/resolv.conf"
  { grep -v '^hosts:' /etc/nsswitch.conf 2>/dev/null || printf 'passwd: files\ngroup: files\nshadow: files\n'; echo "hosts: files"; } >"$ETC/nsswitch.conf"

  local acct=$'JobAcctGatherType=jobacct_gather/none\nAccountingStorageType=accounting_storage/none'
  if [ "${SLURM_LAB_ACCT:-0}" = 1 ]; then
    acct=$'JobAcctGatherType=jobacct_gather/linux\nAccountingStorageType=accounting_storage/slurmdbd\n'"AccountingStorageHost=$addr"$'\n'"AccountingStoragePass=$LAB/munge/munge.socket"$'\n'"AccountingStoragePort=$((base+2+n))"
    printf '%s\n' "AuthType=auth/munge" "AuthInfo=socket=$LAB/munge/munge.socket" "DbdHost=$head" "DbdAddr=$addr" "DbdPort=$((base+2+n))" \
      "SlurmUser=$user" "LogFile=$LOG/slurmdbd.log" "PidFile=$RUN/slurmdbd.slurm-pid" "StorageType=accounting_storage/mysql" \
      "StorageHost=localhost" "StorageUser=$user" "StorageLoc=slurm_acct_db" >"$ETC/slurmdbd.conf"; chmod 600 "$ETC/slurmdbd.conf"
  else rm -f "$ETC/slurmdbd.conf"; fi
  local C=${SLURM_LAB_CPUS:-4} G=${SLURM_LAB_GPUS:-0} gres=""
  if [ "$G" -gt 0 ]; then
    # Slurm wants a character device per GPU before it sets CUDA_VISIBLE_DEVICES; clones of /dev/null do
    gres=" Gres=gpu:$G"; rm -rf "$LAB/fakegpu"; mkdir -p "$LAB/fakegpu"
    if ! for i in $(seq 0 $((G-1))); do mknod -m 666 "$LAB/fakegpu/nvidia$i" c 1 3 2>/dev/null || false; done; then
      say "no mknod: GPUs are counted, CUDA_VISIBLE_DEVICES stays unset"; echo "NodeName=${PREFIX}[1-$n] Name=gpu Count=$G" >"$ETC/gres.conf"
    elif [ "$G" = 1 ]; then echo "NodeName=${PREFIX}[1-$n] Name=gpu File=$LAB/fakegpu/nvidia0" >"$ETC/gres.conf"
    else echo "NodeName=${PREFIX}[1-$n] Name=gpu File=$LAB/fakegpu/nvidia[0-$((G-1))]" >"$ETC/gres.conf"; fi
  else rm -f "$ETC/gres.conf"; fi
  : >"$ETC/plugstack.conf"
  # slurmd loads a cgroup plugin even if nothing uses it. The detected one wants a mounted /sys/fs/cgroup and, for v2,
  # systemd on D-Bus; the v1 plugin wants nothing as long as no other plugin asks it for a controller
  printf '%s\n' "CgroupPlugin=cgroup/v1" "CgroupAutomount=no" "CgroupMountpoint=$LAB/cgroup" "ConstrainCores=no" "ConstrainRAMSpace=no" "ConstrainDevices=no" >"$ETC/cgroup.conf"
  cat >"$ETC/slurm.conf" <<EOF
ClusterName=lab
SlurmctldHost=$head($addr)
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
CredType=cred/munge
# cred_expire: also how long a requeued job waits before it may start again (default 120 s)
AuthInfo=socket=$LAB/munge/munge.socket,cred_expire=${SLURM_LAB_CRED_EXPIRE:-10}
SlurmctldPort=$base
SlurmdPort=$((base+1))
StateSaveLocation=$LAB/state
SlurmdSpoolDir=$LAB/spool/%n
SlurmctldPidFile=$RUN/slurmctld.slurm-pid
SlurmdPidFile=$RUN/slurmd-%n.slurm-pid
SlurmctldLogFile=$LOG/slurmctld.log
SlurmdLogFile=$LOG/slurmd-%n.log
SlurmctldDebug=info
SlurmdDebug=info
PlugStackConfig=$ETC/plugstack.conf
MailProg=/bin/true
# no cgroups, no affinity: the CPUs are pretended
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
$acct
# job history without a database: 'sacct -c' reads this
JobCompType=jobcomp/filetxt
JobCompLoc=$LOG/jobcomp.txt
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
MinJobAge=86400
# fast reactions for tests (defaults: SlurmdTimeout 300, KillWait 30)
SlurmdTimeout=6
SlurmctldTimeout=10
BatchStartTimeout=10
MessageTimeout=5
TCPTimeout=2
InactiveLimit=0
KillWait=5
CompleteWait=0
UnkillableStepTimeout=30
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=100000
${gres:+GresTypes=gpu}
EOF
  for i in $(seq "$n"); do
    echo "NodeName=$PREFIX$i NodeHostname=$([ "$mode" = netns ] && echo $PREFIX$i || echo "$head") NodeAddr=$(node_addr $i "$mode" "$k")$([ "$mode" = ports ] && echo " Port=$((base+1+i))") CPUs=$C Boards=1 SocketsPerBoard=1 CoresPerSocket=$C ThreadsPerCore=1 RealMemory=${SLURM_LAB_MEM:-8000}$gres State=UNKNOWN"
  done >>"$ETC/slurm.conf"
  echo "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP" >>"$ETC/slurm.conf"
  local line key
  while IFS= read -r line; do
    [ -n "$line" ] || continue; key=${line%%=*}
    case $key in NodeName|PartitionName) ;; *) sed -i "/^$key=/Id" "$ETC/slurm.conf";; esac
    printf '%s\n' "$line" >>"$ETC/slurm.conf"
  done <<<"${SLURM_LAB_CONF_EXTRA:-}"
}
node_addr() { if [ "$2" = netns ]; then echo "10.213.$3.$1"; else echo 127.0.0.1; fi; }
load() { [ -r "$LAB/lab.env" ] || return 1; . "$LAB/lab.env"; export SLURM_CONF=$ETC/slurm.conf; }
clean_env() { # the daemons must not inherit a job's or the tester's Slurm variables
  local v; for v in $(compgen -e | grep -E '^(SLURM|SBATCH|SRUN|SQUEUE|SINFO|SCANCEL|MUNGE)' | grep -v '^SLURM_LAB_' || true); do unset "$v"; done; export SLURM_CONF=$ETC/slurm.conf; }

# ---- nodes ------------------------------------------------------------------------------------------------------
# runs as pid 1 of the node (netns mode). Arguments: LAB I NAME ADDR HOSTS PRIVATE
node_init() {
  local lab=$1 i=$2 name=$3 addr=$4 private=${5:-} d sp st
  set +e
  read -r sp _ </proc/self/stat                       # /proc is still the outer one: our pid outside
  st=$(awk '{sub(/.*\) /,""); print $20}' "/proc/$sp/stat")
  hostname "$name"
  mount -t proc proc /proc || exit 1
  mount -t tmpfs -o mode=1777 shm /dev/shm 2>/dev/null
  # names: only the private hosts file. A DNS server out of reach costs 10 s for every name without an AAAA entry
  local f; for f in hosts resolv.conf nsswitch.conf; do [ -e /etc/$f ] || : >/etc/$f; mount --bind "$lab/etc/$f" "$(readlink -f /etc/$f)"; done
  if [ -n "$private" ]; then
    local IFS=:; for d in $private; do mkdir -p "$d" "$lab/local/$name$d"; chmod 1777 "$lab/local/$name$d"; mount --bind "$lab/local/$name$d" "$d"; done; unset IFS; fi
  ip link set lo up
  echo "$sp $st" >"$lab/run/init$i.pid.tmp" && mv "$lab/run/init$i.pid.tmp" "$lab/run/init$i.pid"
  for _ in $(seq 200); do ip link show eth0 >/dev/null 2>&1 && break; sleep 0.05; done
  ip addr add "$addr/24" dev eth0 && ip link set eth0 up || exit 1
  mkdir -p "$lab/spool/$name"
  exec 0</dev/null
  slurmd -D -N "$name" &
  # reap everything that is re-parented to us; stay up even without slurmd (the node is 'on'). Ends by SIGKILL.
  trap 'kill -TERM $(jobs -p) 2>/dev/null' TERM
  while :; do wait; sleep 3600 & wait $!; done
}
sw() { nsenter -t "$(p_of switch)" -n "$@"; }          # run in the switch's network namespace
start_switch() {
  p_of switch >/dev/null && return 0
  start switch "$LOG/switch.log" unshare --net --mount sleep infinity
  local p; p=$(p_of switch)
  wait_for 5 test ! /proc/$p/ns/net -ef /proc/self/ns/net || die "switch namespace"
  sw ip link set lo up; sw ip link add br0 type bridge; sw ip link set br0 up
  # the head's own cable
  ip link add "slurmlab$K" address "$(printf '02:51:%02x:00:00:fe' "$K")" type veth peer name head netns "$p"
  sw ip link set head master br0 up
  ip addr add "$ADDR/24" dev "slurmlab$K"; ip link set "slurmlab$K" up
}
start_acct() { # a database of our own, on a socket only
  local i; for i in mariadb-install-db mariadbd slurmdbd; do command -v $i >/dev/null || die "$i is not installed (SLURM_LAB_ACCT=1 $0 install)"; done
  rm -rf "$LAB/db"
  mariadb-install-db --no-defaults --datadir="$LAB/db" --auth-root-authentication-method=normal --skip-test-db ${EUID:+--user="$(id -un)"} >"$LOG/mariadb-install.log" 2>&1 </dev/null || die "see $LOG/mariadb-install.log"
  start mariadbd "$LOG/mariadbd.log" mariadbd --no-defaults --datadir="$LAB/db" --socket="$LAB/db.sock" --skip-networking --user="$(id -un)" \
     --pid-file="$RUN/mariadbd.db-pid" --innodb-buffer-pool-size=64M --innodb-log-file-size=16M --innodb-lock-wait-timeout=900 --skip-grant-tables --skip-log-bin
  wait_for 20 test -S "$LAB/db.sock" || die "see $LOG/mariadbd.log"
  start slurmdbd "$LOG/slurmdbd.out" env MYSQL_UNIX_PORT="$LAB/db.sock" slurmdbd -D
  wait_for 20 eval '! free_port $((BASE+2+N))' || die "see $LOG/slurmdbd.log"
}
start_node() {
  local i=$1 name=$PREFIX$1
  if [ "$MODE" = netns ]; then
    p_of "init$i" >/dev/null && return 0
    rm -f "$RUN/init$i.pid"
    start "node$i" "$LOG/init-$name.log" unshare --net --uts --mount --pid --ipc --fork --kill-child \
      "$SELF" __node_init "$LAB" "$i" "$name" "$(node_addr "$i" netns "$K")" "$PRIVATE"
  else
    p_of "slurmd$i" >/dev/null && return 0
    mkdir -p "$LAB/spool/$name"
    start "slurmd$i" "$LOG/init-$name.log" env "SLURM_LAB_NODE=$LAB:$i" slurmd -D -N "$name"
  fi
}
plug_node() { # connect the node's cable
  [ "$MODE" = netns ] || return 0
  local i=$1 p
  wait_for 10 p_of "init$i" >/dev/null || die "node $i did not boot; see $LOG/init-$PREFIX$i.log"
  p=$(p_of "init$i")
  [ "$(nsenter -t "$p" -n ip -o link show eth0 2>/dev/null | wc -l)" = 0 ] || return 0
  sw ip link del "port$i" 2>/dev/null || true
  # a fixed MAC address, as a real machine has: a rebooted node would else hide behind stale ARP entries
  ip link add "slp$K-$i" type veth peer name eth0 address "$(printf '02:51:%02x:00:00:%02x' "$K" "$i")" netns "$p"
  ip link set "slp$K-$i" netns "$(p_of switch)" name "port$i"
  sw ip link set "port$i" master br0 up
}
descendants() { # all descendants of pids, deepest last
  local p; for p in "$@"; do echo "$p"; descendants $(awk -v P="$p" '{pid=$1; sub(/.*\) /,""); if ($2==P) print pid}' /proc/[0-9]*/stat 2>/dev/null); done; }
node_procs() { # ports mode: slurmd, its stepds and their tasks of node I
  local f s; local roots=(); s=$(p_of "slurmd$1" || true); [ -z "$s" ] || roots+=("$s")
  for f in /proc/[0-9]*; do
    if { grep -qzxF "SLURM_LAB_NODE=$LAB:$1" "$f/environ" ||
         { grep -qzxF "SLURMD_NODENAME=$PREFIX$1" "$f/environ" && grep -qzxF "SLURM_CONF=$ETC/slurm.conf" "$f/environ"; }; } 2>/dev/null
    then roots+=("${f#/proc/}"); fi
  done
  [ ${#roots[@]} = 0 ] || descendants "${roots[@]}" | sort -un
}
kill_node() {
  local i=$1 p
  if [ "$MODE" = netns ]; then
    # SIGKILL to the pid namespace's init: the kernel kills every process on the node
    if p=$(p_of "init$i"); then kill -KILL "$p"; wait_for 10 eval "! p_of init$i >/dev/null" || return 1; fi
    p_stop "node$i" KILL; rm -f "$RUN/init$i.pid"
    if p_of switch >/dev/null; then sw ip link del "port$i" 2>/dev/null || true; fi
  else
    local ps; ps=$(node_procs "$i"); [ -z "$ps" ] || kill -KILL $ps 2>/dev/null || true
    rm -f "$RUN/slurmd$i.pid"
  fi
}

# ---- commands -----------------------------------------------------------------------------------------------------
hosts_block() { # ports mode: names into /etc/hosts, between markers; in place (may be a bind mount)
  local tag="# slurm-lab $LAB" t
  [ -e /etc/hosts ] || { : >/etc/hosts; } 2>/dev/null || true; [ -w /etc/hosts ] || { [ "$1" = del ] || say "cannot write /etc/hosts: node names will not resolve"; return 0; }
  grep -qF "$tag" /etc/hosts || [ "$1" = add ] || return 0
  t=$(grep -vF "$tag" /etc/hosts || true)
  { printf '%s\n' "$t"; if [ "$1" = add ]; then for i in $(seq "$N"); do echo "127.0.0.1 $PREFIX$i $tag"; done; fi; } >/etc/hosts
}
nodes_idle() { local n; n=$(timeout 5 sinfo -h -N -o '%N %T' 2>/dev/null | grep -c -E ' (idle|mixed|allocated|completing)$' || true); [ "$n" = "$N" ]; }
ready() { p_of slurmctld >/dev/null || die "slurmctld ended: $(tail -n 3 "$LOG/slurmctld.out")"; nodes_idle; }
all_alive() { local i p; p_of munged >/dev/null && p_of slurmctld >/dev/null || return 1
  [ ! -e "$ETC/slurmdbd.conf" ] || p_of slurmdbd >/dev/null || return 1
  for i in $(seq "$N"); do if [ "$MODE" = netns ]; then p_of "init$i" >/dev/null || return 1; else p_of "slurmd$i" >/dev/null || return 1; fi; done; }
cmd_up() {
  local n=${1:-2} t0=$SECONDS i m
  [[ $n =~ ^[0-9]+$ ]] && [ "$n" -ge 1 ] && [ "$n" -le 38 ] || die "up N, 1..38"
  for i in munged slurmctld slurmd sbatch unshare; do command -v $i >/dev/null || die "$i is not installed ('$0 install')"; done
  if load && [ "$N" = "$n" ] && all_alive && nodes_idle; then say "already up ($MODE, $N nodes)"; return 0; fi
  ! load || cmd_down keep
  m=$(pick_mode)
  local d IFS0=$IFS; IFS=:; for d in ${SLURM_LAB_PRIVATE:-}; do case $LAB/ in "${d%/}"/*) die "SLURM_LAB_DIR must not lie under the private $d";; esac; done; IFS=$IFS0
  mkdir -p "$LAB"; rm -rf "$LAB/state" "$LAB/spool" "$LAB/local" "$LAB/db" "$LAB/log.old" "$RUN"
  [ ! -d "$LOG" ] || mv "$LOG" "$LAB/log.old"
  write_conf "$n" "$m"; load
  trap 'trap - EXIT; say "up failed, taking down"; cmd_down keep' EXIT
  clean_env
  start munged "$LOG/munged.out" munged --foreground --socket="$LAB/munge/munge.socket" --key-file="$LAB/munge/munge.key" \
     --pid-file="$RUN/munged.munge-pid" --log-file="$LOG/munged.log" --seed-file="$LAB/munge/munge.seed" --num-threads=4
  wait_for 10 test -S "$LAB/munge/munge.socket" || die "munged: see $LOG/munged.out"
  if [ "$MODE" = netns ]; then start_switch; else hosts_block add; fi
  [ ! -e "$ETC/slurmdbd.conf" ] || start_acct
  start slurmctld "$LOG/slurmctld.out" slurmctld -D -c
  for i in $(seq "$N"); do start_node "$i"; done
  for i in $(seq "$N"); do plug_node "$i"; done
  wait_for "${SLURM_LAB_TIMEOUT:-30}" ready || { sinfo -N -l >&2 || true; tail -n 20 "$LOG"/*.log >&2; die "nodes not idle"; }
  trap - EXIT
  say "up: $MODE mode, $N nodes, $((SECONDS-t0)) s; eval \"\$($0 env)\""
}
cmd_down() {
  load || { say "nothing to take down in $LAB"; return 0; }
  local i rc=0
  p_stop slurmctld KILL || rc=1
  for i in $(seq "$N"); do kill_node "$i" || rc=1; done
  [ "$MODE" != netns ] || ip link del "slurmlab$K" 2>/dev/null || true   # else the kernel does it, a little later
  p_stop switch KILL || rc=1                      # its namespace, bridge and every cable go with it
  [ "$MODE" = netns ] || hosts_block del
  p_stop slurmdbd || rc=1; p_stop mariadbd || rc=1
  p_stop munged || rc=1
  rm -f "$LAB/munge/munge.socket" "$LAB/munge/munge.socket.lock"
  rm -f "$LAB/lab.env"
  [ "${1:-}" = keep ] || say "down (logs stay in $LOG)"
  return $rc
}
cmd_status() {
  load || { say "down"; return 3; }
  local i rc=0 p x; for x in munged slurmctld; do p=$(p_of $x) && echo "$x pid $p" || { echo "$x DOWN"; rc=3; }; done
  for i in $(seq "$N"); do x=$([ "$MODE" = netns ] && echo init || echo slurmd)
    p=$(p_of $x$i) && echo "$PREFIX$i pid $p addr $(node_addr "$i" "$MODE" "$K")" || { echo "$PREFIX$i OFF"; rc=3; }; done
  timeout 10 sinfo -N -o '%8N %12T %15o %4c %G' || rc=3
  return $rc
}
cmd_env() { load || die "not up"; echo "export SLURM_CONF='$ETC/slurm.conf' SLURM_LAB_DIR='$LAB' SLURM_LAB_HOSTS='$ETC/hosts' SLURM_LAB_MODE='$MODE' SLURM_LAB_ADDR='$ADDR'"; }
need_up() { load || die "not up"; [[ ${1:-} =~ ^[0-9]+$ ]] && [ "$1" -ge 1 ] && [ "$1" -le "$N" ] || die "node number 1..$N"; }
nsx() { local p; p=$(p_of "init$1") || die "node $1 is off"; shift; nsenter -t "$p" -n -u -m -p -i -- "$@"; }
slurmd_pid() { # outer pid of node I's slurmd
  if [ "$MODE" = ports ]; then p_of "slurmd$1"; return; fi
  local p c; p=$(p_of "init$1") || return 1
  for c in $(awk -v P="$p" '{pid=$1; n=$2; sub(/.*\) /,""); if ($2==P && n=="(slurmd)") print pid}' /proc/[0-9]*/stat 2>/dev/null); do echo "$c"; return 0; done; return 1; }

locked() { mkdir -p "$LAB"; exec 9>"$LAB/.lock"; flock -w 120 9 || die "another cluster.sh works on $LAB"; }
cmd=${1:-help}; shift || true
case $cmd in
  __node_init) node_init "$@";;
  install) cmd_install;;
  up) locked; cmd_up "$@";;
  down) [ -d "$LAB" ] || exit 0; locked; cmd_down;;
  status) cmd_status;;
  env) cmd_env;;
  run) load || die "not up"; exec "$@";;
  exec) need_up "${1:-}"; i=$1; shift; if [ "$MODE" = netns ]; then nsx "$i" "$@"; else "$@"; fi;;
  kill-node) need_up "${1:-}"; locked; kill_node "$1";;
  start-node) need_up "${1:-}"; locked; clean_env; start_node "$1"; plug_node "$1";;
  kill-slurmd) need_up "${1:-}"; kill -KILL "$(slurmd_pid "$1")";;
  restart-slurmd) need_up "${1:-}"; ! slurmd_pid "$1" >/dev/null || die "slurmd $1 runs"; clean_env
     if [ "$MODE" = netns ]; then nsx "$1" setsid -f slurmd -D -N "$PREFIX$1" </dev/null >>"$LOG/init-$PREFIX$1.log" 2>&1
     else start_node "$1"; fi;;
  partition) need_up "${1:-}"; [ "$MODE" = netns ] || die "netns mode only"; sw ip link set "port$1" down;;
  heal) need_up "${1:-}"; [ "$MODE" = netns ] || die "netns mode only"; sw ip link set "port$1" up;;
  *) sed -n '2,/^set -E/p' "$SELF" | sed '$d; s/^# \{0,1\}//'; [ "$cmd" = help ];;
esac
