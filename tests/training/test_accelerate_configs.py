"""The launch configurations are what the installed Accelerate understands."""

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from support.examples import EXAMPLES

from colora_peft.models.nafnet.modeling_nafnet import NAFBlock

CONFIGS = {path.stem: path for path in (EXAMPLES / "accelerate_configs").glob("*.yaml")}
KINDS = {
    "cpu": DistributedType.NO,
    "multi_gpu_ddp": DistributedType.MULTI_GPU,
    "multi_node_ddp": DistributedType.MULTI_GPU,
    "fsdp": DistributedType.FSDP,
    "deepspeed_zero2": DistributedType.DEEPSPEED,
}


def test_there_is_one_for_each_kind_of_launch():
    assert CONFIGS.keys() == KINDS.keys()


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_it(name):
    config = load_config_from_file(str(CONFIGS[name]))
    assert config.distributed_type == KINDS[name] and config.mixed_precision in ("no", "bf16")
    assert config.num_processes % config.num_machines == 0


@pytest.mark.parametrize(("name", "part"), [("fsdp", "fsdp_config"), ("deepspeed_zero2", "deepspeed_config")])
def test_the_launcher_has_every_flag_of_its_part(name, part):
    """Accelerate drops keys of this part that it does not know without a word."""
    settings = yaml.safe_load(CONFIGS[name].read_text())[part]
    assert settings.keys() <= {action.dest for action in launch_command_parser()._actions}


def test_the_part_of_fsdp_fits_our_networks():
    settings = yaml.safe_load(CONFIGS["fsdp"].read_text())["fsdp_config"]
    assert settings["fsdp_version"] == 2
    assert settings["fsdp_transformer_layer_cls_to_wrap"] == NAFBlock.__name__
