"""A stand-in for PBS Professional, of which no server is packaged: qsub, qstat, qdel, qsig, and what runs a job.

Written after the documents (qsub(1B), qsig(1B), qstat(1B)) and the source of OpenPBS, from which the grammar, the messages,
the statuses and the order of events are taken; and after docs.abci.ai/v3/en/job-execution for what ABCI 3.0 adds. Jobs are
real processes in a session of their own, with real files and real signals. Its answers were compared once with those of
OpenPBS 23.06.06 built from source: the refusals in tests/clusters/test_pbs_grammar.py, a job's environment and processes, what
qsig, qdel and the walltime do to a job whose script traps the signal, `qsub "$0"` from within a job, and $PBS_NODEFILE.

What a real PBS does that it cannot show: several hosts (each host is this one), the scheduler's order and fairness, points,
cgroups that hide other jobs' GPUs or end processes outside of the job's session, hosts that fail, routing queues, job
arrays, interactive jobs, dependencies, reservations, mail, and the wording with which ABCI's own checks refuse a job. A real
PBS looks at limits and kill_delay every few seconds to minutes (a walltime of 5 s ended a job after 10 s, and killed it after
21 s), this one at once. `qstat -f` folds long lines there, and shows more.
"""
