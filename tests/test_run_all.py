"""Tests of run_all: what it hands on, in what order it runs the scripts, and how it stops."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pipeline import METHODS, REPOSITORY
from refusals import RESULTS_OF

from common import run_all
from common.cli.flags import SCRIPTS, RunAllConfig
from common.cli.parser import parse
from common.errors import UserError

SHARED_FLAGS = [
    "--demo", "--root", "some where", "--seed", "5", "--model", "a/b", "--overwrite", "--images_per_class", "7",
    "--fire_source", "photos", "--fire_classes", "low", "high risk", "--game_classes", "chess", "go",
    "--expert", "fire=here", "game=a/b",
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
run_all.SIDE_BY_SIDE, run_all.torch_threads = list(run_all.SCRIPTS), lambda: 2
run_all.headline = lambda *_: ""
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
        sys.stdout.write("saved\\n")
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


def test_it_runs_the_six_scripts_in_order_up_to_a_failure_and_ends_with_the_summary(workspace, mutable, monkeypatch, capsys):
    started, flags = [], ["--demo", "--root", str(workspace.root)]
    first, last = [["Data_Preparation"], ["Generate_Base_Model"], ["Benchmark"]], [["CGM_Lora"]]
    monkeypatch.setattr(run_all, "run_scripts", lambda commands: started.append([Path(path).stem for path in commands]) or
                        [2 * ("Lora_Finetune" in path and len(started) > 12) for path in commands])
    monkeypatch.setattr(run_all, "torch_threads", lambda: 2)
    run_all.main(parse(RunAllConfig, [*flags, "--side_by_side", "no"]))
    assert started == [*first, ["Finetune"], ["Lora_Finetune"], *last]
    expected, *lines = capsys.readouterr().out.splitlines()
    assert re.match(r"The demo takes about \d+ seconds", expected) and lines[6] == ""
    assert lines[0] == "[1/6] Data_Preparation: 0 s, fire risk: 40 images, video games: 40 images"
    accuracy = workspace.summary().set_index(["method", "task"])["accuracy"]
    for line, number, script in zip(lines[1:6], range(2, 7), list(SCRIPTS)[1:], strict=True):
        fire, game = (accuracy[RESULTS_OF[script], title] for title in ("Fire_Risk", "Game"))
        assert line == f"[{number}/6] {script}: 0 s, fire risk {fire:.1%}, video games {game:.1%}"
    assert all("\n".join(lines[6:]).count(f"{method} ") >= 2 for method in METHODS)
    assert lines[-1].endswith(f"all results on one page: {workspace.results / 'index.html'}")
    run_all.main(parse(RunAllConfig, [*flags, "--quiet", "no"]))
    assert started[6:] == [*first, ["Finetune", "Lora_Finetune"], *last]
    assert "[4/5] Finetune and Lora_Finetune: \n[4/5] Finetune and Lora_Finetune: 0 s, Finetune: fire" in capsys.readouterr().out
    with pytest.raises(UserError, match="Lora_Finetune.py ended with status 2"):
        run_all.main(parse(RunAllConfig, flags))
    assert len(started) == 15
    monkeypatch.setattr(run_all, "torch_threads", lambda: 1)
    finished = mutable.results / "Lora_Finetune" / "config.json"
    with pytest.raises(UserError, match="Lora_Finetune.py ended with status 2"):
        run_all.main(parse(RunAllConfig, ["--demo", "--root", str(mutable.root), "--expert", "fire=here"]))
    assert finished.exists()
    with pytest.raises(UserError, match="Lora_Finetune.py ended with status 2"):
        run_all.main(parse(RunAllConfig, ["--demo", "--root", str(mutable.root), "--expert", "fire=here", "--overwrite"]))
    assert not finished.exists()  # all experts are made anew, not only that of --expert
    assert len(run_all.steps(parse(RunAllConfig, flags))) == len(SCRIPTS)  # on one core nothing is gained


def test_a_script_runs_as_from_a_terminal(tmp_path, capfd):
    """It has its own name, flags and exit status, and is the main module; all that it has printed arrives."""
    script = tmp_path / "some script.py"
    script.write_text("import sys\nassert __name__ == '__main__' and sys.modules['__main__'].__file__ == sys.argv[0]\n"
                      "print(sys.argv)\nsys.exit(7)\n")
    assert run_all.run_scripts({str(script): ["--a", "b c"]}) == [7]
    assert capfd.readouterr().out == f"{[str(script), '--a', 'b c']}\n"


def test_with_quiet_nothing_but_errors_arrives(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys\nprint('much')\nprint('wrong', file=sys.stderr)\n")
    code = ("import sys; from common import run_all\nprint('before')\nwith run_all.stdout_closed():\n"
            "    run_all.run_scripts({sys.argv[1]: []})\nprint('after')")
    done = subprocess.run([sys.executable, "-c", code, script], capture_output=True, text=True, cwd=REPOSITORY)
    assert (done.stdout, done.stderr) == ("before\nafter\n", "wrong\n")


def test_scripts_side_by_side_share_the_threads_and_draw_no_bars(tmp_path):
    """Each waits for what the other writes first, and ends with a status of its own."""
    scripts = [str(tmp_path / name) for name in ("some.py", "other.py")]
    for status, (path, other) in enumerate(zip(scripts, scripts[::-1], strict=True)):
        Path(path).write_text(
            f"import sys, time, torch\nfrom pathlib import Path\nPath('{path}.here').touch()\n"
            f"for _ in range(3000):\n    time.sleep(0.01)\n    if Path('{other}.here').exists(): break\n"
            "else:\n    sys.exit('alone')\n"
            f"sys.stderr.write(f'{{torch.get_num_threads()}} {{sys.stderr.isatty()}}\\n')\nsys.exit({status})")
    code = ("import sys; from common import run_all; run_all.torch_threads = lambda: 6; assert sys.stderr.isatty()\n"
            "print(run_all.run_scripts({path: [] for path in sys.argv[1:]}))")
    terminal, screen = os.openpty()
    output = subprocess.run([sys.executable, "-c", code, *scripts], stdout=subprocess.PIPE, stderr=screen, text=True,
                            cwd=REPOSITORY, timeout=60).stdout
    os.write(screen, b"end")
    shown = b""
    while not shown.endswith(b"end"):  # it arrives in pieces
        shown += os.read(terminal, 1000)
    os.close(screen)
    os.close(terminal)
    assert (output, shown.split()) == ("[0, 1]\n", [b"3", b"False", b"3", b"False", b"end"])


def test_ctrl_c_and_sigterm_let_a_script_save_and_start_no_other(tmp_path):
    """Ctrl-C comes to all processes, SIGTERM to run_all alone. Whether the script was at its end or not, all ends there; so it
    is where two run side by side."""
    names = [str(tmp_path / name) for name in ("second", "first")]
    for number, send, then in ((signal.SIGINT, os.killpg, "raise"), (signal.SIGTERM, os.kill, "sys.exit(3)")):
        for flags, at_work in (["no"], 1), (["yes"], 2):
            (tmp_path / "first.py").write_text(SLOW.format(then=then))
            (tmp_path / "second.py").write_text(SLOW.format(then=then) if at_work > 1 else "print('second')")
            command = [sys.executable, "-c", TWO_SCRIPTS, "--side_by_side", *flags, *names]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY,
                                  start_new_session=True) as process:
                while at_work:
                    at_work -= "at work" in process.stdout.readline()
                send(process.pid, number)
                output, errors = process.communicate()
            scripts = ["first.py", "second.py"] if flags == ["yes"] else ["first.py"]
            assert process.returncode == 130, (number, then, errors)
            assert [line for line in output.splitlines() if line != "at work"][-len(scripts) :] == ["saved"] * len(scripts)
            *told, last = [line.partition(": interrupted; ")[0] for line in errors.splitlines()]
            assert (sorted(told), last) == (scripts if then == "raise" else [], "-c")
