"""Pushing and pulling with the real client against a Hub on this machine, and all that can be wrong with a result."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub.file_download
import huggingface_hub.hf_api
import pytest
import safetensors.torch
import torch
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from support.examples import load_example
from support.hub_server import TOKEN, HubServer
from torch import nn
from transformers import AutoModelForImageToImage, HfArgumentParser

import colora_peft
from colora_peft import CoLoRAConfig
from colora_peft.hub import create_hub_repo, push_folder
from colora_peft.hub.networks import load_backbone

IMAGE = torch.rand(1, 3, 20, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def server():
    with HubServer() as server:
        yield server


@pytest.fixture
def hub(server, monkeypatch, tmp_path):
    """The server, empty, as the Hub that this process knows, with an empty cache; logged in."""
    server.repos.clear()
    server.requests.clear()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    for module in (constants, huggingface_hub.file_download):  # the second in older versions
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_URL_HOSTS", frozenset({"127.0.0.1"}), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    set_offline(monkeypatch, False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.forget_faults()
    forget_sessions()


def set_offline(monkeypatch, offline: bool) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    forget_sessions()


def forget_sessions() -> None:
    """Older clients remember in them whether they are offline."""
    if hasattr(huggingface_hub.utils, "reset_sessions"):
        huggingface_hub.utils.reset_sessions()


def new_adapter(base: nn.Module, seed: int = 0) -> PeftModel:
    """An adapter that does something."""
    torch.manual_seed(seed)
    return get_peft_model(base, CoLoRAConfig(ranks=1, init_weights=False)).eval()


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IMAGE).reconstruction


@pytest.fixture
def base(hub, tiny_nafnet) -> nn.Module:
    """The tiny network, as it comes from someone/base."""
    hub.add("someone/base", {path.name: path.read_bytes() for path in tiny_nafnet.iterdir()})
    return load_backbone("someone/base")


@pytest.fixture(scope="module")
def adapter_files(tiny_nafnet, tmp_path_factory) -> dict[str, bytes]:
    """Files of an adapter whose base is a folder."""
    folder = tmp_path_factory.mktemp("adapter")
    new_adapter(load_backbone(str(tiny_nafnet))).save_pretrained(folder)
    return {name: (folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}


def with_config(files: dict[str, bytes], **changes: object) -> dict[str, bytes]:
    content = {**json.loads(files["adapter_config.json"]), **changes}
    return {**files, "adapter_config.json": json.dumps(content).encode()}


# -------------------------------------------------------------------------------------------------------- push, pull


def test_what_was_pushed_is_what_is_pulled(hub, base):
    model = new_adapter(base)
    model.push_to_hub("someone/adapter")
    pulled = colora_peft.load("someone/adapter")
    assert isinstance(pulled, PeftModel) and not pulled.training
    assert not any(parameter.requires_grad for parameter in pulled.parameters())
    assert torch.equal(output(pulled), output(model))
    assert not torch.equal(output(pulled), output(load_backbone("someone/base")))


@pytest.mark.slow
def test_another_process_pulls_it_into_an_empty_cache_and_again_offline(hub, base, tmp_path):
    model = new_adapter(base)
    model.push_to_hub("someone/adapter", private=True)
    script = f"""
import torch, colora_peft
model = colora_peft.load("someone/adapter")
with torch.no_grad():
    image = torch.rand(1, 3, 20, 24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(image).reconstruction, torch.tensor({output(model).tolist()}))
"""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    offline = {**environment, "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    del offline["HF_TOKEN"]
    for env in (environment, offline):
        done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_a_new_revision_and_the_old_one(hub, base):
    first = new_adapter(base)
    first.push_to_hub("someone/adapter")
    old = hub.repos["someone/adapter"].branches["main"]
    second = new_adapter(load_backbone("someone/base"), seed=1)
    second.push_to_hub("someone/adapter")
    assert torch.equal(output(colora_peft.load("someone/adapter")), output(second))
    assert torch.equal(output(colora_peft.load("someone/adapter", revision=old)), output(first))


def test_the_base_is_that_of_the_training_even_where_its_repository_moved_on(hub, base):
    model = new_adapter(base)
    model.push_to_hub("someone/adapter")
    assert model.peft_config["default"].revision == hub.repos["someone/base"].branches["main"]
    other = load_backbone("someone/base")
    nn.init.normal_(other.ending.weight)
    other.push_to_hub("someone/base")
    assert torch.equal(output(colora_peft.load("someone/adapter")), output(model))
    with pytest.raises(
        ValueError, match="It calls that 'someone/base', which has changed since: pass base= with a copy"
    ):
        colora_peft.load("someone/adapter", base="someone/base")


def test_a_private_repository_needs_a_token(hub, base, monkeypatch):
    new_adapter(base).push_to_hub("someone/adapter", private=True)
    monkeypatch.delenv("HF_TOKEN")
    for token in (None, False, "hf_of_somebody_else"):
        with pytest.raises(OSError, match="someone/adapter.*private.*hf auth login. or HF_TOKEN"):
            colora_peft.load("someone/adapter", token=token)
    assert isinstance(colora_peft.load("someone/adapter", token=TOKEN), PeftModel)


def test_a_subfolder(hub, base, adapter_files):
    hub.add("someone/many", {f"deep/haze/{name}": content for name, content in adapter_files.items()})
    assert isinstance(colora_peft.load("someone/many", subfolder="deep/haze", base=base), PeftModel)
    with pytest.raises(ValueError, match="someone/many holds no adapter_config.json or config.json"):
        colora_peft.load("someone/many")


def test_a_whole_network_is_pulled_by_transformers_and_by_us(hub, tiny_nafnet):
    network = AutoModelForImageToImage.from_pretrained(tiny_nafnet)
    network.push_to_hub("someone/network")
    assert torch.equal(output(AutoModelForImageToImage.from_pretrained("someone/network")), output(network))
    pulled = colora_peft.load("someone/network")
    assert torch.equal(output(pulled), output(network)) and not pulled.training
    with pytest.raises(ValueError, match="someone/network is a whole network.*leave out base"):
        colora_peft.load("someone/network", base=network)


def test_the_cache_serves_where_the_hub_does_not(hub, base, monkeypatch):
    model = new_adapter(base)
    model.push_to_hub("someone/adapter")
    colora_peft.load("someone/adapter")
    hub.requests.clear()
    set_offline(monkeypatch, True)
    assert torch.equal(output(colora_peft.load("someone/adapter")), output(model)) and not hub.requests
    with pytest.raises(FileNotFoundError, match="someone/other is not in the cache.*HF_HUB_OFFLINE"):
        colora_peft.load("someone/other")
    set_offline(monkeypatch, False)
    hub.status = 503
    with pytest.warns(UserWarning, match="answered 503.*copy in the cache"):
        assert torch.equal(output(colora_peft.load("someone/adapter")), output(model))


def test_nothing_but_four_names_is_asked_for(hub, base, adapter_files, tmp_path):
    names = ("../../../escaped.json", "/escaped.json", "modeling_evil.py", "adapter_model.bin", "x/../../escaped.json")
    hub.add("someone/evil", {**adapter_files, **dict.fromkeys(names, b"{}")})
    before = set(tmp_path.rglob("*"))
    hub.requests.clear()
    colora_peft.load("someone/evil", base=base)
    asked = {request.rpartition("/")[2] for request in hub.requests if "/resolve/" in request}
    assert asked == {"adapter_config.json", "adapter_model.safetensors"}
    new = [path for path in set(tmp_path.rglob("*")) - before if not path.is_relative_to(tmp_path / "cache")]
    assert not new


# -------------------------------------------------------------------------------------------------------------- base


def test_the_wrong_base_is_an_error_and_stays_as_it_is(hub, base, adapter_files):
    hub.add("someone/adapter", adapter_files)
    with torch.no_grad():
        base.ending.bias[0] += 1.0
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match="trained on another network.*weights differ"):
        colora_peft.load("someone/adapter", base=base)
    assert [name for name, _ in base.named_modules()] == names


def test_a_compiled_base_is_refused_bare_and_adapted(hub, base, adapter_files):
    hub.add("someone/adapter", adapter_files)
    for network in (base, colora_peft.load("someone/adapter", base=base)):
        with pytest.raises(ValueError, match="^The network is compiled.*then compile what.*load returns"):
            colora_peft.load("someone/adapter", base=torch.compile(network), adapter_name="other")


@pytest.mark.parametrize("unknown", ["in the adapter", "in the base"])
def test_what_cannot_be_compared_is_said(hub, base, adapter_files, unknown):
    if unknown == "in the adapter":
        adapter_files = with_config(adapter_files, base_fingerprint=None)
    else:
        base = base.bfloat16()
    hub.add("someone/adapter", adapter_files)
    with pytest.warns(UserWarning, match="the right one was not checked"):
        colora_peft.load("someone/adapter", base=base)


def test_a_relative_base_is_found_from_here_and_from_the_adapter(tiny_nafnet, tmp_path, monkeypatch):
    (tmp_path / "project" / "nets").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    load_backbone(str(tiny_nafnet)).save_pretrained("nets/base")
    model = new_adapter(load_backbone("nets/base"))
    model.save_pretrained("outputs/mine")
    assert model.peft_config["default"].base_model_name_or_path == "nets/base"
    assert torch.equal(output(colora_peft.load("outputs/mine")), output(model))
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert torch.equal(output(colora_peft.load(tmp_path / "project" / "outputs" / "mine")), output(model))
    (tmp_path / "project" / "nets").rename(tmp_path / "moved")
    with pytest.raises(OSError, match="base nets/base of .* was not found.*pass base="):
        colora_peft.load(tmp_path / "project" / "outputs" / "mine")
    found = colora_peft.load(tmp_path / "project" / "outputs" / "mine", base=tmp_path / "moved" / "base")
    assert torch.equal(output(found), output(model))


def test_a_function_that_an_adapter_names_is_not_called(hub, adapter_files):
    hub.add("someone/evil", with_config(adapter_files, base_model_name_or_path="os:getcwd"))
    with pytest.raises(ValueError, match="made by the function os:getcwd.*if you trust it, pass base='os:getcwd'"):
        colora_peft.load("someone/evil")
    with pytest.raises(TypeError, match="os:getcwd returned str"):  # now it is called
        colora_peft.load("someone/evil", base="os:getcwd")


def test_a_network_carries_several(hub, base, adapter_files):
    hub.add("someone/haze", adapter_files)
    rain = new_adapter(load_backbone("someone/base"), seed=1)
    rain.push_to_hub("someone/rain")
    model = colora_peft.load("someone/haze", base=base, adapter_name="haze")
    haze = output(model)
    assert colora_peft.load("someone/rain", base=model, adapter_name="rain") is model
    assert torch.equal(output(model), output(rain))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.set_adapter("haze")
    assert torch.equal(output(model), haze)
    with pytest.raises(ValueError, match="has an adapter 'rain'"):
        colora_peft.load("someone/rain", base=model, adapter_name="rain")


# --------------------------------------------------------------------------------------------------------- bad input


def without(name: str):
    return lambda files: {key: content for key, content in files.items() if key != name}


def cut_short(files):
    return {**files, "adapter_model.safetensors": files["adapter_model.safetensors"][:-7]}


def pickled(files):
    return {"adapter_config.json": files["adapter_config.json"], "adapter_model.bin": b"\x80\x04."}


def broken_json(files):
    return {**files, "adapter_config.json": files["adapter_config.json"][:-9]}


def a_weight_short(files):
    weights = safetensors.torch.load(files["adapter_model.safetensors"])
    del weights["base_model.model.intro.colora_B"]
    return {**files, "adapter_model.safetensors": safetensors.torch.save(weights)}


def changed(**changes: object):
    return lambda files: with_config(files, **changes)


BAD_FILES = {
    "pickle": (pickled, "adapter_model.bin only, a pickle"),
    "no weights": (without("adapter_model.safetensors"), "but no adapter_model.safetensors: it is incomplete"),
    "no config": (without("adapter_config.json"), "holds no adapter_config.json or config.json"),
    "cut short": (cut_short, "adapter_model.safetensors of someone/bad is damaged"),
    "broken json": (broken_json, "adapter_config.json of someone/bad is damaged"),
    "a list": (lambda files: {**files, "adapter_config.json": b"[]"}, "adapter_config.json of someone/bad is damaged"),
    "newer method": (changed(method_version=99), "newer colora_peft .method_version 99"),
    "other method": (changed(peft_type="LORA"), "adapter of the PEFT method 'LORA', not COLORA"),
    "a path as scores": (changed(contributions="/etc/hostname"), "contributions of someone/bad are a path"),
    "ranks of another network": (changed(ranks={"nowhere": 2}), "cannot be put on a NAFNet.*nowhere"),
    "a weight short": (a_weight_short, "cannot be put on a NAFNet.*missing: intro.colora_B"),
    "senseless ranks": (changed(ranks={"intro": "two"}), "someone/bad cannot be used.*'two'"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_named_and_the_base_and_the_cache_stay_usable(hub, base, adapter_files, spoil, message):
    hub.add("someone/bad", spoil(adapter_files))
    bare = output(base)
    with pytest.raises(ValueError, match=message) as caught:
        colora_peft.load("someone/bad", base=base)
    assert "\n" not in str(caught.value)
    assert torch.equal(output(base), bare)
    hub.add("someone/bad", adapter_files)  # its author repairs it
    assert isinstance(colora_peft.load("someone/bad", base=base), PeftModel)


def test_what_is_not_there_is_named(hub, base, adapter_files, tmp_path):
    hub.add("someone/adapter", adapter_files)
    for call, message in {
        lambda: colora_peft.load("someone/nothing"): "no model someone/nothing",
        lambda: colora_peft.load("someone/adapter", revision="v9"): "no revision 'v9'",
        lambda: colora_peft.load(tmp_path / "nowhere"): "no folder .*nowhere",
        lambda: colora_peft.load("someone/adapter", base="someone/nothing"): "no model someone/nothing",
    }.items():
        with pytest.raises(OSError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("subfolder", ["../other", "/etc", "a/../../b", "a\\..\\b"])
def test_a_subfolder_does_not_lead_out(subfolder, tmp_path):
    with pytest.raises(ValueError, match="leads out of"):
        colora_peft.load(tmp_path, subfolder=subfolder)


def test_a_hub_that_hangs_is_given_up(hub, adapter_files, monkeypatch):
    hub.add("someone/adapter", adapter_files)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.3)
    hub.answering.clear()
    with pytest.raises(
        OSError, match=r"someone/adapter is no folder .* be fetched from http://127.*Timeout.*connection"
    ):
        colora_peft.load("someone/adapter")


def test_a_download_that_breaks_off_leaves_the_cache_usable(hub, base, adapter_files, monkeypatch):
    hub.add("someone/adapter", adapter_files)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)  # the client tries again
    hub.truncated = ".safetensors"
    with pytest.raises(OSError, match="someone/adapter is no folder on this machine and could not be fetched"):
        colora_peft.load("someone/adapter", base=base)
    hub.forget_faults()
    assert isinstance(colora_peft.load("someone/adapter", base=base), PeftModel)


def test_an_old_snapshot_without_the_files_is_not_taken_for_them(hub, base, adapter_files, monkeypatch):
    """The client falls back to any snapshot that it has if the Hub fails after it named the files."""
    hub.add("someone/adapter", {f"old/{name}": content for name, content in adapter_files.items()})
    colora_peft.load("someone/adapter", subfolder="old", base=base)
    hub.add("someone/adapter", adapter_files)

    def failing(*args, **settings):
        hub.status = 500
        return huggingface_hub.snapshot_download(*args, **settings)

    monkeypatch.setattr("colora_peft.hub.source.snapshot_download", failing)
    with pytest.raises(
        OSError,
        match=r"^someone/adapter is no folder .*could not be fetched from http.*: check the name, .*again\.$",
    ):
        colora_peft.load("someone/adapter", base=base)


@pytest.mark.parametrize(("status", "message"), [(401, "refused access.*401"), (403, "403"), (500, "answered 500")])
def test_a_refusal_is_said_in_words(hub, status, message):
    hub.status = status
    with pytest.raises(OSError, match=message):
        colora_peft.load("someone/adapter")


def test_another_method_of_peft_on_the_base_is_refused(hub, base, adapter_files):
    hub.add("someone/adapter", adapter_files)
    with pytest.raises(ValueError, match="another PEFT method"):
        colora_peft.load("someone/adapter", base=get_peft_model(base, LoraConfig(target_modules=["intro"])))
    with pytest.raises(TypeError, match="base is a int"):
        colora_peft.load("someone/adapter", base=3)


# ---------------------------------------------------------------------------------------------------- pushing a run


def test_a_run_pushes_what_its_card_shows_and_the_snippet_of_the_card_works(
    hub, train_dir, eval_dir, tiny_nafnet, tmp_path, monkeypatch, capsys
):
    finetune = load_example("finetune")
    flags = ["--train_dir", train_dir, "--eval_dir", eval_dir, "--model_name_or_path", tiny_nafnet]
    flags += ["--max_train_steps", 1, "--resolution", 32, "--output_dir", tmp_path / "out", "--probe_batches", 1]
    flags += ["--push_to_hub", "--hub_model_id", "someone/mine", "--hub_private_repo", "--data_card", "tests, CC0"]
    finetune.main(HfArgumentParser(finetune.FinetuneArguments).parse_args_into_dataclasses([*map(str, flags)])[0])
    assert "is not on the Hub; who loads it must pass base=" in capsys.readouterr().out

    repo = hub.repos["someone/mine"]
    assert repo.private
    files = repo.files_of()
    card = files["README.md"].decode()
    assert {"before_after.png", "contribution.png"} == set(re.findall(r"!\[[^]]*\]\((.*?)\)", card)) < files.keys()
    pushed = {"adapter_config.json", "adapter_model.safetensors", "metrics.json", "contributions.json", "README.md"}
    pushed |= {"preprocessor_config.json"}
    assert files.keys() - {".gitattributes"} == pushed | {"before_after.png", "contribution.png"}

    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert snippet.startswith("import colora_peft\n") and 'colora_peft.load("someone/mine", base=' in snippet
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (30, 20), "teal").save("photo.jpg")
    exec(snippet, {})
    assert Image.open("restored.png").size == (30, 20)


def test_only_results_are_pushed(hub, adapter_files, tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoint-4").mkdir(parents=True)
    for name, content in {**adapter_files, "train_log.jsonl": b"", "checkpoint-4/state.json": b"{}"}.items():
        (folder / name).write_bytes(content)
    assert push_folder(folder, create_hub_repo("run")) == hub.repos["someone/run"].branches["main"]
    assert hub.repos["someone/run"].files_of().keys() == {".gitattributes", *adapter_files}
    for image in ("../secret.png", "missing.png"):
        (tmp_path / "secret.png").write_bytes(b"mine")
        (folder / "README.md").write_text(f"![an image]({image})")
        with pytest.raises(ValueError, match=f"shows {image}"):
            push_folder(folder, "someone/run")
    with pytest.raises(ValueError, match="no adapter and no network"):
        push_folder(tmp_path / "run" / "checkpoint-4", "someone/run")


def test_what_is_to_be_private_is_not_pushed_in_public(hub, monkeypatch):
    create_hub_repo("mine")
    with pytest.raises(ValueError, match="someone/mine is there and public"):
        create_hub_repo("someone/mine", private=True)
    create_hub_repo("hidden", private=True)
    assert hub.repos["someone/hidden"].private and not hub.repos["someone/mine"].private
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(OSError, match="Cannot push to someone/other"):
        create_hub_repo("someone/other")


def test_a_run_that_may_not_push_ends_before_it_begins(hub, train_dir, tiny_nafnet, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    pretrain = load_example("pretrain")
    flags = ["--train_dir", train_dir / "input", "--config_name", tiny_nafnet, "--output_dir", tmp_path / "out"]
    flags = [*flags, "--max_train_steps", 1, "--resolution", 32, "--push_to_hub"]
    (args,) = HfArgumentParser(pretrain.PretrainArguments).parse_args_into_dataclasses([*map(str, flags)])
    with pytest.raises(OSError, match="Cannot push to out"):
        pretrain.main(args)
    assert not Path(args.output_dir).exists()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    pretrain.main(args)
    pushed = colora_peft.load("someone/out")
    assert torch.equal(output(pushed), output(load_backbone(args.output_dir)))
    with pytest.raises(ValueError, match="no effect without --push_to_hub"):
        pretrain.PretrainArguments(train_dir="x", hub_model_id="someone/out")
