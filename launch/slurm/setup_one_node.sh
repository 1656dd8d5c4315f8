#!/bin/bash
# Makes this machine a SLURM cluster of one node, for trying launch.slurm out: Debian or Ubuntu, as root.
#
#     bash launch/slurm/setup_one_node.sh          sets up and starts; the last line of a success is "SLURM is up"
#     bash launch/slurm/setup_one_node.sh stop     stops the daemons
#
# No accounting, no cgroups and no time synchronisation: it is no model of a real cluster.
set -euo pipefail

stop() {
  for daemon in slurmctld slurmd munged; do
    if [ -s "/run/$daemon.pid" ]; then kill "$(cat "/run/$daemon.pid")" 2>/dev/null || true; fi
  done
}
if [ "${1:-}" = stop ]; then
  if [ -s /run/munge/munged.pid ]; then kill "$(cat /run/munge/munged.pid)" || true; fi
  stop
  exit
fi
if [ "$(id -u)" -ne 0 ]; then
  echo "setup_one_node.sh installs packages: run it as root" >&2
  exit 1
fi

export DEBIAN_FRONTEND=noninteractive
if ! { command -v slurmctld && command -v slurmd && command -v munged; } >/dev/null; then
  apt-get update --quiet
  apt-get install --quiet --yes --no-install-recommends slurmctld slurmd slurm-client munge
fi

node=$(hostname --short)
cores=$(nproc)
memory=$(awk '/MemTotal/ { print int($2 / 1024 * 0.9) }' /proc/meminfo)
mkdir -p /etc/slurm /var/spool/slurmctld /var/spool/slurmd /var/log/slurm /run/munge
cat >/etc/slurm/slurm.conf <<CONF
ClusterName=one
SlurmctldHost=$node
SlurmUser=root
AuthType=auth/munge
StateSaveLocation=/var/spool/slurmctld
SlurmdSpoolDir=/var/spool/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile=/var/log/slurm/slurmctld.log
SlurmdLogFile=/var/log/slurm/slurmd.log
# Without cgroups: they want systemd, which containers lack.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
# Cores and memory are shared out; a job gives way to one of a higher partition and is queued again.
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
KillWait=30
NodeName=$node CPUs=$cores RealMemory=$memory State=UNKNOWN
PartitionName=low Nodes=$node Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=120
PartitionName=high Nodes=$node MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
CONF

if [ ! -s /etc/munge/munge.key ]; then
  dd if=/dev/urandom of=/etc/munge/munge.key bs=1 count=1024 status=none
fi
chown -R munge: /etc/munge /run/munge
chmod 400 /etc/munge/munge.key
pgrep -x munged >/dev/null || runuser -u munge -- munged
pgrep -x slurmctld >/dev/null || slurmctld
pgrep -x slurmd >/dev/null || slurmd

for _ in $(seq 30); do
  if [ "$(sinfo --noheader --format=%T --partition=low 2>/dev/null)" = idle ]; then
    echo "SLURM is up"
    exit
  fi
  sleep 1
done
echo "SLURM did not come up: see /var/log/slurm" >&2
exit 1
