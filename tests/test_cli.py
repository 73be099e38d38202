"""Tests of the command line: flags and help, how a script ends, which of several processes speaks, and nothing on import."""

import os
import re
import subprocess
import sys

import pytest
from pipeline import REPOSITORY

from common.cli.flags import SCRIPTS, RunAllConfig, RunFlags
from common.cli.parser import command, parse
from common.errors import UserError

# A script of which every process does what it is told by its own flag.
SCRIPT = """
import os, sys
from dataclasses import dataclass
from typing import ClassVar
from common.cli.flags import RunFlags, option
from common.cli.run import run
from common.errors import UserError
@dataclass
class Config(RunFlags):
    _argument_group_name: ClassVar[str] = "test"
    then: str = option("", "what to do")
def main(config):
    exec(config.then)
run(main, Config)
"""


# Values of flags that have no default, where not any text will do.
OF_NO_DEFAULT = {"accumulation_steps": "3", "learning_rate": "0.1", "zip_encoding": "gbk"}


@pytest.fixture
def ended(tmp_path):
    """Run a script that does `then` in a process of its own: status, stdout, stderr."""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)

    def run_it(then, *flags, stdout=subprocess.PIPE, **environment):
        done = subprocess.run([sys.executable, path, "--then", then, *flags], stdout=stdout, stderr=subprocess.PIPE, text=True,
                              env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "", **environment})
        return done.returncode, done.stdout, done.stderr

    return run_it


def test_every_flag_may_be_written_with_hyphens_and_is_told_by_help(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "500")  # no line breaks within a flag's help
    for config_class in (*SCRIPTS.values(), RunAllConfig):
        with pytest.raises(SystemExit) as end:
            parse(config_class, ["--help"])
        said, demo = capsys.readouterr().out, parse(config_class, ["--demo"])
        assert end.value.code == 0 and "with --demo demo" in said
        for name, default in vars(config_class()).items():
            told = re.search(rf"\n  --{name}[ ,].*?(?=\n *--|\n\n|\Z)", said, re.DOTALL)[0]
            shown = {True: "yes", False: "no"}[default] if isinstance(default, bool) else default
            assert default in (None, []) or f"(default: {shown}" in told
            assert bool(re.search(r"(\(|; )with --demo ", told)) == (getattr(demo, name) != default and name != "demo")
            value = OF_NO_DEFAULT.get(name, "a=b") if default in (None, []) else "no" if isinstance(default, bool) else str(default)
            if "_" in name:
                assert parse(config_class, [f"--{name}", value]) == parse(config_class, [f"--{name.replace('_', '-')}", value])


def test_flags_are_read_by_their_types():
    mixture, data = SCRIPTS["CGM_Lora"], SCRIPTS["Data_Preparation"]
    assert parse(mixture, ["--augment"]).augment is True
    assert parse(mixture, ["--demo", "--augment", "no"]).augment is False
    assert parse(data, ["--task", "a=x", "--task", "b=y"]).task == ["a=x", "b=y"] == parse(data, ["--task", "a=x", "b=y"]).task
    config = parse(SCRIPTS["Finetune"], ["--demo", "--learning_rate", "1e-3", "--epochs", "3"])
    assert (config.learning_rate, config.epochs, config.batch_size) == (0.001, 3, 16)  # a flag wins over the demo


def test_the_command_of_a_message_has_what_differs_from_the_defaults():
    config = parse(RunFlags, ["--demo", "--root", "some where", "--seed", "5", "--overwrite"])
    assert command("Finetune", config) == "python Finetune.py --demo --root 'some where' --seed 5"


def test_help_imports_no_library():
    """Each of these takes from a tenth of a second to several seconds."""
    code = ("import runpy, sys\nsys.argv = ['', '--help']\n"
            f"for script in {[*(f'{script}.py' for script in SCRIPTS), 'common/run_all.py']}:\n"
            "    try: runpy.run_path(script, run_name='__main__')\n    except SystemExit: pass\n"
            "slow = {'torch', 'transformers', 'datasets', 'matplotlib', 'numpy', 'pandas', 'scipy'}\n"
            "sys.exit(str(sys.modules.keys() & slow))")
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    assert done.stdout.count("usage:") == 7 and done.stderr == "set()\n"


def test_importing_a_module_changes_nothing_outside_it_and_a_script_has_an_empty_stderr(workspace, tmp_path):
    """Against the libraries alone: log levels, warning filters, matplotlib's backend, the environment."""
    code = (
        "import accelerate, datasets, huggingface_hub, matplotlib, peft, sklearn.metrics, transformers\n"
        "import importlib, logging, os, pkgutil, runpy, sys, warnings\n"
        "from transformers import BeitForImageClassification, PreTrainedModel\n"
        "def state():\n"
        "    levels = {name: logging.getLogger(name).level for name in (None, 'datasets', 'huggingface_hub', 'transformers')}\n"
        "    bars = datasets.are_progress_bars_disabled(), transformers.utils.logging.is_progress_bar_enabled()\n"
        "    backend = matplotlib.rcParams._get('backend')\n"
        "    return levels, bars, list(warnings.filters), backend, dict(os.environ)\n"
        "before = state()\n"
        "import common, ContextGatedMOE\n"
        "for package in (common, ContextGatedMOE):\n"
        "    for module in pkgutil.walk_packages(package.__path__, f'{package.__name__}.'):\n"
        "        importlib.import_module(module.name)\n"
        "differ = [(old, new) for old, new in zip(before, state()) if old != new]\n"
        "if differ: sys.exit(str(differ))\n"
        "sys.argv.pop(0)\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n")
    command = [sys.executable, "-c", code, REPOSITORY / "Benchmark.py", *workspace.flags("Benchmark")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    assert (done.returncode, done.stderr) == (0, "") and "Benchmark is finished already" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_script_ends_with_its_status_and_a_line_where_there_is_something_to_say(ended):
    stopped = "script.py: interrupted; finished results are whole; run the same command to go on\n"
    fault = "a fault of the program; the lines above tell where\n"
    for then, status, last in (
            ("print('done')", 0, ""),
            ("raise UserError('a\\udcff\\nb')", 2, "script.py: a\\udcff b\n"),  # with a path that is no UTF-8
            ("os.kill(os.getpid(), 15)", 130, stopped),
            ("raise OSError('libcudart.so.12: cannot open shared object file')", 1, f"script.py: unexpected OSError, {fault}"),
            ("open('/no/such/file')", 1, f"script.py: unexpected FileNotFoundError, {fault}")):
        code, out, err = ended(then)
        assert code == status and err.endswith(last) and out == ("done\n" if then.startswith("print") else ""), (then, err)
        assert err.startswith("Traceback (most recent call last):\n") if status == 1 else err == last
    assert ended("raise KeyboardInterrupt", "--overwrite")[2].endswith("; run the same command without --overwrite to go on\n")


def test_a_terminal_that_cannot_show_a_character_ends_nothing(ended):
    """Nor does a path that is no UTF-8."""
    for then, encoding, out in (("print('\\u68ee \\udcff')", "ascii", "\\u68ee \\udcff\n"),
                                ("print('\\udcff')", "utf-8", "\\udcff\n")):
        assert ended(then, PYTHONIOENCODING=encoding) == (0, out, "")
    alone = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "1", "LOCAL_RANK": "0"}
    assert ended("import common.cli.processes", "--seed", "-1", "--root", "\u68ee", PYTHONIOENCODING="ascii", **alone)[0] == 2
    assert ended("raise UserError('\\u68ee')", PYTHONIOENCODING="ascii") == (2, "", "script.py: \\u68ee\n")


def test_output_that_cannot_be_written_is_told(ended):
    """Nothing that was printed is lost without a word: not at the end, nor in the middle, nor beside another error."""
    line = "script.py: stdout cannot be written (No space left on device); send it elsewhere and run the same command again\n"
    for then in ("print('short')", "print('x', flush=True)"):
        with open("/dev/full", "w") as full:
            assert ended(then, stdout=full) == (2, None, line)
    with open("/dev/full", "w") as full:
        assert ended("print('x'); raise UserError('other')", stdout=full) == (2, None, "script.py: other\n")
    reader, writer = os.pipe()
    os.close(reader)
    assert ended("print('x')", stdout=writer)[2] == line.replace("No space left on device", "Broken pipe")
    os.close(writer)


def test_output_is_written_before_a_process_of_several_ends(ended):
    """These end without the interpreter's own clean-up."""
    alone = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    join = "import common.cli.processes as p; "
    for then, rank, local_rank, told in (
            ("pass", "0", "0", "script.py: --seed"), (join, "1", "1", ""),  # rank 0 tells it
            (join, "1", "0", "rank 1: script.py: --seed")):  # the first process of another machine
        code, out, err = ended(then, "--seed", "-1", **alone | {"RANK": rank, "LOCAL_RANK": local_rank})
        assert (code, out) == (2, "") and err.startswith(told) and bool(err) == bool(told)
    assert ended("print('done')", RANK="3") == (0, "done\n", "")  # without other processes it is the main one


def test_root_must_be_a_folder(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for root in ("file", "file/below", "loop", "x" * 300, "a::b", "a::b/c"):
        with pytest.raises(UserError, match="--root .*; choose "):
            parse(RunFlags, ["--root", str(tmp_path / root)])
    assert parse(RunFlags, ["--root", str(tmp_path / "new")]).root == str(tmp_path / "new")
