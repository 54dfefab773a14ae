"""What the stand-in's qsub accepts and refuses. The answers are those that qsub of OpenPBS 23.06.06 gave to the same lines."""

from pathlib import Path

import pytest

from ds_recipes.cluster.job_script import default_job, render
from tests.clusters.pbs import GROUP, pbs_cell
from tests.clusters.pbs_bin import grammar, site
from tests.clusters.pbs_bin.grammar import Refused

REFUSED = [
    # directive, how the message begins, status
    ("-Y 1", "qsub: invalid option -- 'Y'\nqsub: directive error: -Y 1 \n", 1),
    ("x", "qsub: directive error: x \n", 1),
    ("-q", "qsub: option requires an argument -- 'q'\nqsub: directive error: -q \n", 1),
    ("-l", "qsub: option requires an argument -- 'l'\nqsub: directive error: -l \n", 1),
    ("-l walltime=abc", "qsub: Illegal attribute or resource value Resource_List.walltime\n", 166),
    ("-l walltime=1:00:00:00", "qsub: Illegal attribute or resource value Resource_List.walltime\n", 166),
    ("-l walltime=10,", "qsub: illegal -l value\nqsub: directive error: -l walltime=10, \n", 1),
    ("-l foo=1", "qsub: Unknown resource Resource_List.foo\n", 187),
    ("-l select=2:foo=1", "qsub: Unknown resource: foo\n", 187),
    ("-l select=1:walltime=10", 'qsub: Resource invalid in "select" specification: walltime\n', 4),
    ("-l select=0", "qsub: Illegal attribute or resource value\n", 166),
    ("-l select=", "qsub: Illegal attribute or resource value Resource_List.select\n", 166),
    ("-l select=1+", "qsub: Illegal attribute or resource value Resource_List.select\n", 166),
    ("-l select=1:ncpus", "qsub: Illegal attribute or resource value Resource_List.select\n", 166),
    ("-l select=1:ncpus=two", "qsub: Illegal attribute or resource value select.ncpus\n", 166),
    (
        "-l select=1 -l ncpus=3",
        'qsub: "-lresource=" cannot be used with "select" or "place", resource is: ncpus\n',
        5,
    ),
    ("-N 'a b'", "qsub: illegal -N value\nusage: qsub", 2),
    ("-N a/b", "qsub: illegal -N value\nusage: qsub", 2),
    ("-N 'abc", "qsub: unmatched ", 1),
    (f"-N {'x' * 231}", "qsub: Job name is too long \n", 2),
    ("-j x", "qsub: illegal -j value\nusage: qsub", 2),
    ("-k d", "qsub: illegal -k value\nusage: qsub", 2),
    ("-k oxd", "qsub: illegal -k value\nusage: qsub", 2),
    ("-m q", "qsub: illegal -m value\nusage: qsub", 2),
    ("-p 5000", "qsub: illegal -p value\nusage: qsub", 2),
    ("-r maybe", "qsub: illegal -r value\nqsub: directive error: -r maybe \n", 1),
    ("-W foo", "qsub: illegal -W value\nqsub: directive error: -W foo \n", 1),
    ("-W foo=1", "qsub: Error (15002) submitting job\n", 154),
]
ACCEPTED = [
    "-N 1abc",
    f"-N {'x' * 230}",
    "-l walltime=",
    "-l walltime=1:2",
    "-l walltime=90",
    "-l select=1:ncpus=192:ngpus=8+3:ncpus=4,walltime=12:00:00",
    "-j oe -koed -m abe -r n",
    "-k n -j eo",
    "-v \"A=1,B='x,y'\" -W umask=022,block=false",
]


@pytest.mark.parametrize(("directive", "message", "status"), REFUSED)
def test_refused(directive: str, message: str, status: int) -> None:
    with pytest.raises(Refused) as refused:
        grammar.read([], f"#!/bin/bash\n#PBS {directive}\n")
    assert str(refused.value).startswith(message)
    assert refused.value.status == status


@pytest.mark.parametrize("directive", ACCEPTED)
def test_accepted(directive: str) -> None:
    grammar.read([], f"#!/bin/bash\n#PBS {directive}\n")


def test_directives_end_at_the_first_line_that_is_run() -> None:
    script = "#!/bin/sh\n\n  #PBS -N a\n# PBS -N b\n#PBS -l \\\nwalltime=5\n:\n#PBS -N c\necho x\n"
    assert [text.split() for text in grammar.directives(script)] == [["-N", "a"], ["-l", "walltime=5"], ["-N", "c"]]
    assert grammar.directives("echo x\n#PBS -Y\n") == []
    with pytest.raises(Refused, match="script contains cr, lf"):
        grammar.directives("#!/bin/sh\r\n#PBS -N a\r\n")


def test_the_command_line_wins_then_the_last_option_but_the_first_resource() -> None:
    request = grammar.read(
        ["-N", "mine", "-l", "walltime=7"],
        "#PBS -N theirs -q one\n#PBS -q two -l walltime=9,select=1\n#PBS -l select=2\n",
    )
    assert request.options == {"N": "mine", "q": "two"}
    assert request.resources == {"walltime": "7", "select": "1"}


def test_chunks_and_variables() -> None:
    request = grammar.read([], "#PBS -l select=2:ncpus=192:mpiprocs=8+1:ngpus=1\n")
    assert request.chunks == [{"ncpus": 192, "mpiprocs": 8}] * 2 + [{"ngpus": 1}]
    assert grammar.variables("A=1,B='x,y',HOME", {"HOME": "/h"}) == {"A": "1", "B": "x,y", "HOME": "/h"}
    with pytest.raises(Refused, match="cannot send environment"):
        grammar.variables("NOT_THERE", {})


ABCI = "-q rt_HF -P gaa50000 -l select=4 -l walltime=12:00:00"


@pytest.mark.parametrize(
    ("changed", "to", "message"),
    [
        ("-q rt_HF", "", "-q"),
        ("-q rt_HF", "-q rt_F", "Unknown queue"),
        ("-P gaa50000", "", "-P"),
        ("gaa50000", "gzz00000", "not in the group"),
        ("-l select=4", "", "select"),
        ("select=4", "select=129", "1 to 128 nodes"),
        ("rt_HF", "rt_HG", "1 to 1 nodes"),
        ("12:00:00", "168:00:01", "168:00:00"),
        ("select=4 -l walltime=12:00:00", "select=128 -l walltime=168:00:01", "168"),
        ("select=4", "select=4 -v USE_SSH=3", "USE_SSH"),
    ],
)
def test_what_abci_asks_for(changed: str, to: str, message: str) -> None:
    site.check(grammar.read([], f"#PBS {ABCI}\n"), ("gaa50000",))
    with pytest.raises(Refused, match=message):
        site.check(grammar.read([], f"#PBS {ABCI.replace(changed, to)}\n"), ("gaa50000",))


def test_our_script_asks_for_what_abci_gives() -> None:
    text = render(default_job("abci-pbs")).replace("-P GROUP", f"-P {GROUP}")
    request = grammar.read([], text)
    site.check(request, (GROUP,))
    assert request.chunks == [{"ncpus": 192, "ngpus": 8, "mpiprocs": 8, "ompthreads": 24}] * 2
    assert request.walltime_seconds == 12 * 3600
    assert grammar.variables(request.options["v"], {}) == {"RTYPE": "rt_HF", "USE_SSH": "1"}
    assert (request.options["j"], request.options["k"]) == ("oe", "oed")


def test_a_job_as_the_programs_show_it(tmp_path: Path) -> None:
    """The environment that PBS documents, the files of output, the statuses, and what qstat, qsig and qdel answer."""
    folder = tmp_path / "some folder"
    folder.mkdir()
    script = folder / "my job.sh"
    script.write_text(
        f"#!/bin/bash\n#PBS -q rt_HF -P {GROUP} -l select=2:mpiprocs=3:ompthreads=4 -l walltime=60\n#PBS -v A='b c'\n"
        'env; cat "$PBS_NODEFILE"; pwd; umask; echo wrong >&2; exit 3\n'
    )
    with pbs_cell(tmp_path, hosts=("n1", "n2")) as pbs:
        done = pbs.until_finished(pbs.submit(script, folder, "-N", "short"), timeout=30)
        assert done.status == 3
        output = (folder / "short.o123456").read_text().splitlines()
        assert (folder / "short.e123456").read_text() == "wrong\n"
        env = dict(line.split("=", 1) for line in output if "=" in line)
        assert env["PBS_JOBID"] == "123456.pbs1" and env["PBS_ENVIRONMENT"] == "PBS_BATCH" and env["A"] == "b c"
        assert (env["OMP_NUM_THREADS"], env["NCPUS"], env["PBS_TASKNUM"], env["PBS_QUEUE"]) == ("4", "4", "1", "rt_HF")
        assert (env["PBS_O_WORKDIR"], env["PBS_JOBDIR"], env["PBS_JOBNAME"]) == (str(folder), str(pbs.home), "short")
        assert "PYTEST_CURRENT_TEST" not in env
        assert output[-8:] == ["n1"] * 3 + ["n2"] * 3 + [str(pbs.home), "0077"]
        assert "    Exit_status = 3\n" in pbs.run("qstat", "-fx", "123456").stdout
        known = pbs.run("qstat", "123456.pbs1")
        assert (known.returncode, "Job has finished, use -x or -H" in known.stderr) == (35, True)
        for words, status, message in (
            (("qstat", "99"), 153, "qstat: Unknown Job Id 99.pbs1\n"),
            (("qdel", "123456"), 35, "qdel: Job has finished 123456.pbs1\n"),
            (("qsig", "-s", "USR1", "123456"), 35, "qsig: Job has finished\n"),
            (("qsub", "no such file"), 1, "qsub: script file:: No such file or directory\n"),
            (("qsub", "-q", "nowhere", str(script)), 170, "qsub: Unknown queue\n"),
        ):
            answer = pbs.run(*words)
            assert (answer.returncode, answer.stderr) == (status, message)
        starved = pbs.run("qsub", "-l", "select=1:ngpus=9", str(script), cwd=folder).stdout.strip()
        assert (pbs.job(starved).state, pbs.run("qdel", starved).returncode) == ("Q", 0)
        assert pbs.job(starved).state == "F"
