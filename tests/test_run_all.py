"""Tests of run_all: what it hands on, in what order it runs the scripts, and how it stops."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pipeline import METHODS, REPOSITORY

from common import run_all
from common.cli.flags import SCRIPTS, RunAllConfig
from common.cli.parser import parse
from common.errors import UserError

SHARED_FLAGS = [
    "--demo", "--root", "some where", "--seed", "5", "--model", "a/b", "--overwrite", "--images_per_class", "7",
    "--fire_source", "photos", "--fire_classes", "low", "high risk", "--game_classes", "chess", "go",
]
# run_all of two scripts in a folder of their own, whose names come from the command line.
TWO_SCRIPTS = """
import signal, sys
from common import run_all
from common.cli.flags import RunAllConfig, RunFlags
from common.cli.run import run
signal.signal(signal.SIGINT, signal.default_int_handler)  # even if whoever runs the tests ignores it
run_all.import_libraries = lambda: None  # which takes seconds, and these scripts use none
run_all.SCRIPTS = {sys.argv.pop(): RunFlags, sys.argv.pop(): RunFlags}
run(run_all.main, RunAllConfig)
"""
# A script that takes its time, and some more to save when it is asked to stop.
SLOW = """
import sys, time
from common.cli.flags import RunFlags
from common.cli.run import run
def main(config):
    try:
        print("at work", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(0.3)
        print("saved")
        {then}
run(main, RunFlags)
"""


def test_every_script_gets_the_flags_it_shares_with_run_all_and_keeps_its_other_defaults():
    for flags in ([], ["--demo"], SHARED_FLAGS):
        given = parse(RunAllConfig, flags)
        for config_class in SCRIPTS.values():
            received = vars(parse(config_class, run_all.flags_for(given, config_class)))
            shared = vars(given).keys() & received.keys()
            assert {name: received[name] for name in shared} == {name: vars(given)[name] for name in shared}
            own = vars(parse(config_class, ["--demo"] if "--demo" in flags else []))
            assert {name: received[name] for name in received.keys() - shared} == {
                name: own[name] for name in own.keys() - shared}


def test_it_runs_the_six_scripts_in_order_up_to_a_failure_and_ends_with_the_summary(workspace, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(run_all, "run_script", lambda path, flags: started.append(Path(path).name))
    run_all.main(parse(RunAllConfig, ["--demo", "--root", str(workspace.root)]))
    assert started == [f"{name}.py" for name in (
        "Data_Preparation", "Generate_Base_Model", "Benchmark", "Finetune", "Lora_Finetune", "CGM_Lora")]
    summary = capsys.readouterr().out.partition("== Summary ==")[2]
    assert all(summary.count(f"{method} ") >= 2 for method in METHODS)
    monkeypatch.setattr(run_all, "run_script", lambda path, flags: started.append(path) or 2 * (len(started) == 9))
    with pytest.raises(UserError, match="Benchmark.py ended with status 2"):
        run_all.main(parse(RunAllConfig, ["--demo", "--root", str(workspace.root)]))
    assert len(started) == 9


def test_a_script_runs_as_from_a_terminal(tmp_path, capfd):
    """It has its own name, flags and exit status, and is the main module; all that it has printed arrives."""
    script = tmp_path / "some script.py"
    script.write_text("import sys\nassert __name__ == '__main__' and sys.modules['__main__'].__file__ == sys.argv[0]\n"
                      "print(sys.argv)\nsys.exit(7)\n")
    assert run_all.run_script(str(script), ["--a", "b c"]) == 7
    assert capfd.readouterr().out == f"{[str(script), '--a', 'b c']}\n"


def test_ctrl_c_and_sigterm_let_a_script_save_and_start_no_other(tmp_path):
    """Ctrl-C comes to both processes, SIGTERM to run_all alone. Whether the script was at its end or not, all ends there."""
    command = [sys.executable, "-c", TWO_SCRIPTS, str(tmp_path / "second"), str(tmp_path / "first")]
    (tmp_path / "second.py").write_text("print('second')")
    for number, send, then in ((signal.SIGINT, os.killpg, "raise"), (signal.SIGTERM, os.kill, "sys.exit(3)")):
        (tmp_path / "first.py").write_text(SLOW.format(then=then))
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY,
                              start_new_session=True) as process:
            while "at work" not in process.stdout.readline():
                pass
            send(process.pid, number)
            output, errors = process.communicate()
        told = ["first.py", "-c"] if then == "raise" else ["-c"]
        assert (process.returncode, output) == (130, "saved\n"), (number, then, errors)
        assert [line.partition(": interrupted; ")[0] for line in errors.splitlines()] == told
