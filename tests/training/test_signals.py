"""A clean stop: SIGTERM and SIGINT end a run between two steps, with a checkpoint that goes on bitwise."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file
from support.examples import EXAMPLES
from support.loop import NoisyPatches, assert_equal, launch_two, nafnet, run

from colora_peft.training.checkpoint import list_checkpoints
from colora_peft.training.signals import StopSignals, TrainingStopped


class SignalsAt(NoisyPatches):
    """Sends this process the signals when the sample of this number is asked for."""

    def __init__(self, number, *signals):
        super().__init__()
        self.number = number
        self.signals = signals

    def __getitem__(self, number):
        if number == self.number:
            for signum in self.signals:
                os.kill(os.getpid(), signum)
        return super().__getitem__(number)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_run_is_saved_after_the_step_and_goes_on_bitwise(tmp_path, capfd, signum, code):
    flags = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, "use_ema": True}
    expected = run(tmp_path / "whole", nafnet(), **flags)
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(TrainingStopped) as stopped:
        run(tmp_path / "parts", nafnet(), SignalsAt(6, signum), **flags)  # number 6 begins step 3
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before
    assert stopped.value.code == code and stopped.value.step == 4
    assert list_checkpoints(tmp_path / "parts") == [tmp_path / "parts" / "checkpoint-4"] == [stopped.value.checkpoint]
    error = capfd.readouterr().err
    assert f"Stopped by {signal.Signals(signum).name} after step 4 of 6" in error
    assert "--resume_from_checkpoint latest." in error
    assert_equal(run(tmp_path / "parts", nafnet(), resume_from_checkpoint="latest", **flags), expected)


def test_repeated_signals_stop_once_and_sigterm_decides(tmp_path):
    with pytest.raises(TrainingStopped) as stopped:
        run(tmp_path, nafnet(), SignalsAt(2, signal.SIGINT, signal.SIGTERM, signal.SIGINT))
    assert (stopped.value.code, stopped.value.step) == (143, 2)


def test_signal_in_the_last_step_leaves_a_finished_run(tmp_path):
    expected = run(tmp_path / "whole", nafnet())
    with pytest.raises(TrainingStopped):
        run(tmp_path / "run", nafnet(), SignalsAt(11, signal.SIGTERM))
    assert_equal(load_file(tmp_path / "run" / "checkpoint-6" / "model.safetensors"), expected)


def test_handlers_come_back_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError), StopSignals():
        assert signal.getsignal(signal.SIGTERM) != before
        raise KeyError
    assert signal.getsignal(signal.SIGTERM) == before


def test_outside_of_the_main_thread_no_handler_is_installed():
    before, inside = signal.getsignal(signal.SIGTERM), []

    def enter():
        with StopSignals():
            inside.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert inside == [before]


@pytest.mark.slow
def test_processes_agree_on_the_step_where_only_one_got_the_signal(tmp_path):
    launch_two(tmp_path, tmp_path / "run", signal_at=5)  # number 5 is of step 2 on the second process
    for rank in (0, 1):
        assert (tmp_path / f"stopped{rank}").read_text() == "TrainingStopped 143"
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-3"]


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_to_a_script_and_its_workers_ends_it_cleanly(tmp_path, train_dir, tiny_nafnet, signum, code):
    """As a cluster and a terminal do: every process of the group gets it, those of the data loader too."""
    out = tmp_path / "out"
    command = [sys.executable, str(EXAMPLES / "pretrain.py"), "--train_dir", str(train_dir / "input")]
    command += ["--config_name", str(tiny_nafnet), "--output_dir", str(out), "--max_train_steps", "1000000"]
    command += ["--per_device_train_batch_size", "2", "--resolution", "32", "--dataloader_num_workers", "2"]
    with open(tmp_path / "stderr", "w") as stderr:
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
        process = subprocess.Popen(command, stderr=stderr, start_new_session=True, env=environment)
        wait_until((out / "train_log.jsonl").is_file, process)
        os.killpg(process.pid, signum)
        assert process.wait(timeout=120) == code
    error = (tmp_path / "stderr").read_text()
    assert f"Stopped by {signal.Signals(signum).name} after step" in error and "Traceback" not in error
    (checkpoint,) = list_checkpoints(out)
    assert all(torch.isfinite(tensor).all() for tensor in load_file(checkpoint / "model.safetensors").values())


def wait_until(condition, process, seconds=200):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
