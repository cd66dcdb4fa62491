# SPDX-License-Identifier: Apache-2.0
"""What a server is refused at its start: checks on vLLM's own configuration and registry, without an engine."""

import copy
import dataclasses
import pickle
import subprocess
import sys

import pytest
import torch

pytest.importorskip("vllm.entrypoints")

import vllm
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from aqua_attention.config import AquaConfig
from aqua_attention.errors import AquaError
from aqua_attention.vllm import plugin
from aqua_attention.vllm.attention import AquaAttention
from aqua_attention.vllm.backend import AquaBackend
from aqua_attention.vllm.checks import ALLOW, TESTED, check_version, why_not
from aqua_attention.vllm.settings import CONFIG, INT8, PROJECTIONS, serving
from aqua_attention.vllm.versions import LAYOUTS
from conftest import calibrated, make_llama

named = pytest.mark.skipif(not hasattr(AttentionBackendEnum, "register"), reason="this vLLM has no other names")
on_cpu = pytest.mark.skipif(not current_platform.is_cpu(), reason="of vLLM's CPU platform")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    make_llama().to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture
def configured(folder):
    """`configured(**options)`: the configuration that vLLM makes of its options."""
    return lambda **options: EngineArgs(str(folder), skip_tokenizer_init=True, **options).create_engine_config()


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """Of a server with AQUA; what this process has read of it is forgotten."""
    calibrated(make_llama()).save(tmp_path / "tiny.safetensors")
    monkeypatch.setenv(PROJECTIONS, str(tmp_path / "tiny.safetensors"))
    monkeypatch.delenv(CONFIG, raising=False)
    overrides = {member: member.get_path() for member in AttentionBackendEnum if member.is_overridden()}
    serving.cache_clear()
    yield monkeypatch
    serving.cache_clear()
    for member in AttentionBackendEnum:
        member.clear_override()
    for member, path in overrides.items():
        register_backend(member, path)


APART = {"distributed_executor_backend": "mp"}
"""Of more processes than there are GPUs here."""
REFUSED = [
    ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype is fp8, .*: leave it out"),
    ({"kv_cache_dtype": "float16"}, "kv_cache_dtype is float16, .*the model's dtype: leave it out"),
    (
        {"tensor_parallel_size": 4, "decode_context_parallel_size": 2, **APART},
        "decode_context_parallel_size is 2, .*: set it to 1",
    ),
    ({"kv_offloading_size": 1.0}, "kv_connector is OffloadingConnector, .*: leave .* and kv_offloading_size out"),
    (
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
        r"speculative decoding \(ngram\) is not served by AQUA yet: leave speculative_config out",
    ),
]


@pytest.mark.parametrize(("options", "said"), REFUSED)
def test_what_aqua_does_not_serve_is_named_with_its_value_and_remedy(configured, environment, options, said):
    config = configured(**options)
    with set_current_vllm_config(config), pytest.raises(AquaError, match=said) as error:
        AquaAttention(4, 16, 0.25, 2, None, None, "auto")
    assert "\n" not in str(error.value)
    with set_current_vllm_config(config):  # what a GPU's platform asks first
        assert AquaBackend.validate_configuration(16, torch.bfloat16) == [str(error.value)]


def test_what_it_serves_is_not_refused(configured, environment):
    for options in ({}, {"kv_cache_dtype": "bfloat16"}, {"tensor_parallel_size": 2, **APART}, {"enforce_eager": True}):
        assert why_not(configured(**options)) is None


def test_eight_bits_go_with_their_cache(configured, environment):
    eight = dataclasses.replace(serving(), config=AquaConfig(bits=8))
    environment.setattr("aqua_attention.vllm.checks.serving", lambda: eight)
    assert why_not(configured()) == f"kv_cache_dtype is auto, and {CONFIG} asks for bits 8: set it to {INT8}"
    assert why_not(configured(kv_cache_dtype=INT8)) is None


def test_tokens_are_chosen_where_pages_have_room_for_what_they_are_chosen_by(configured, environment):
    chosen = dataclasses.replace(serving(), config=AquaConfig(select_p=0.9, score_bits=8))
    environment.setattr("aqua_attention.vllm.checks.serving", lambda: chosen)
    assert (why_not(configured()) is None) == (LAYOUTS is not None)
    config = configured()
    config.parallel_config.enable_dbo = True
    assert why_not(config).startswith("halves of a batch run at once (enable_dbo or ubatch_size)")
    environment.setattr("aqua_attention.vllm.versions.LAYOUTS", None)
    environment.setattr(vllm, "__version__", "0.26.0")
    assert why_not(configured()) == (
        "vLLM is 0.26.0, whose pages have no room for what tokens are chosen by: install 0.30 or newer, or leave "
        f"select_p and select_tokens out of {CONFIG}"
    )


def test_what_vllm_does_on_a_gpu_only_is_refused(configured):
    config = configured()
    config.parallel_config.prefill_context_parallel_size = 2
    assert why_not(config).startswith("prefill_context_parallel_size is 2, and AQUA does not split a sequence")
    config.model_config.is_mm_prefix_lm = True
    assert "attends to images in both directions" in why_not(config)


def test_vllm_asks_the_rest_by_itself(configured, environment):
    given = {"use_mla": False, "has_sink": True, "use_sparse": False, "use_mm_prefix": False}
    given |= {"use_per_head_quant_scales": False, "device_capability": None, "attn_type": "decoder"}
    with set_current_vllm_config(configured()):
        found = AquaBackend.validate_configuration(16, torch.bfloat16, "auto", 64, **given)
    assert found == ["attention sinks not supported"]


def test_this_version_is_tested():
    check_version(vllm.__version__)


@pytest.mark.parametrize("version", ["0.25.1", "0.320.0", "0.99.0", "1.0.0", "dev"])
def test_other_versions_are_refused_and_may_be_allowed(version, monkeypatch):
    monkeypatch.delenv(ALLOW, raising=False)
    with pytest.raises(AquaError, match=rf"vLLM is {version}, and AQUA was tested with .*{TESTED[-1]}: .*{ALLOW}=1"):
        check_version(version)
    monkeypatch.setenv(ALLOW, "1")
    with pytest.warns(UserWarning, match=f"vLLM is {version}"):
        check_version(version)


def test_an_untested_version_is_refused_only_where_aqua_is_wanted(environment):
    environment.setattr(vllm, "__version__", "0.99.0")
    environment.delenv(ALLOW, raising=False)
    with pytest.raises(AquaError, match=r"vLLM is 0\.99\.0"):
        plugin.register()
    environment.delenv(PROJECTIONS)
    plugin.register()


def test_a_wrong_file_is_said_when_the_plugin_loads(environment, tmp_path):
    environment.setenv(PROJECTIONS, str(tmp_path / "none.safetensors"))
    with pytest.raises(AquaError, match=f"{PROJECTIONS}: .*none.safetensors"):
        plugin.register()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("quick", f"{CONFIG}: preset is 'quick'"),
        ("{", f"{CONFIG} is '{{': it is no JSON"),
        ('{"select_p": 0.9}', f"{CONFIG}: score_bits is 16, and vLLM's pages hold .* in 8 bits: set it to 8"),
        (
            '{"select_tokens": 9, "score_bits": 8, "bits": 8}',
            f"{CONFIG}: bits is 8 with select_tokens=9, which is not served in vLLM yet: leave one of them out",
        ),
        ('{"logit_error": 0.1}', f"{CONFIG}: logit_error is 0.1, which is not served in vLLM yet: leave it out"),
        ('{"min_length": "auto"}', f"{CONFIG}: min_length is 'auto', .*: give a number"),
    ],
)
def test_a_wrong_setting_is_said_when_the_plugin_loads(environment, setting, said):
    environment.setenv(CONFIG, setting)
    with pytest.raises(AquaError, match=said):
        plugin.register()


@named
def test_registering_again_changes_nothing(environment):
    for _ in range(3):
        plugin.register()
    assert plugin.backend_name() == AquaBackend.get_name() == "AQUA"
    assert AttentionBackendEnum["AQUA"].get_class() is AquaBackend
    # Of the registry's own placeholder somebody else may have need.
    assert not AttentionBackendEnum.CUSTOM.is_overridden()


@on_cpu
def test_on_a_cpu_it_stands_in_for_the_platforms_own(environment):
    plugin.register()
    assert AttentionBackendEnum.CPU_ATTN.get_class() is AquaBackend


@named
def test_a_process_that_has_loaded_no_plugin_reads_it(environment, tmp_path):
    plugin.register()
    (tmp_path / "pickled").write_bytes(pickle.dumps(AttentionBackendEnum["AQUA"]))
    read = "import pathlib, pickle, sys; print(pickle.loads(pathlib.Path(sys.argv[1]).read_bytes()).name)"
    done = subprocess.run([sys.executable, "-c", read, tmp_path / "pickled"], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["AQUA"], done.stderr
    assert copy.deepcopy(AttentionBackendEnum["AQUA"]) is AttentionBackendEnum["AQUA"]


def test_where_there_are_no_names_it_is_the_custom_backend(environment):
    """As up to 0.31; the registry is this version's, without what newer ones have."""
    environment.delattr(AttentionBackendEnum, "register", raising=False)
    for _ in range(3):
        plugin.register()
    assert plugin.backend_name() == AquaBackend.get_name() == "CUSTOM"
    assert AttentionBackendEnum.CUSTOM.get_class() is AquaBackend


def test_somebody_elses_custom_backend_stays_where_aqua_is_not_wanted(environment):
    environment.delattr(AttentionBackendEnum, "register", raising=False)
    environment.delenv(PROJECTIONS)
    register_backend(AttentionBackendEnum.CUSTOM, "some.other.Backend")
    plugin.register()
    assert AttentionBackendEnum.CUSTOM.get_path() == "some.other.Backend"


@on_cpu
def test_latent_attention_is_refused_on_a_cpu_too(environment):
    plugin.register()
    for name in ("CPU_MLA", "AMX_MLA"):
        with pytest.raises(AquaError, match=r"latent attention \(MLA\), which AQUA does not serve: choose another"):
            AttentionBackendEnum[name].get_class().get_name()
