"""The measurements of loading and of many tasks, launched on their smallest settings."""

import pytest
from support.experiments import launch


@pytest.mark.slow
def test_launched_measurement_of_loading_prints_every_operation():
    done = launch("storage.loading", "--rounds", 1)
    assert done.returncode == 0, done.stderr
    for operation in ("colora_peft.load", "base_fingerprint", "set_adapter and run", "hotswap_adapter, prepared"):
        assert f"| colora | {operation} |" in done.stdout
    assert "| lora | load_adapter |" in done.stdout


@pytest.mark.slow
def test_launched_measurement_of_tasks_writes_a_line_for_each_way(tiny_nafnet, tmp_path):
    done = launch("storage.tasks", "--num_tasks", 2, "--models", tiny_nafnet, "--output_file", tmp_path / "tasks.md")
    assert done.returncode == 0, done.stderr
    assert "| tiny | 2 | base and adapters of 7% |" in (tmp_path / "tasks.md").read_text()
