"""Real architectures of transformers with random weights: what is swapped, fused, kept, undone, saved and loaded."""

from __future__ import annotations

from pathlib import Path

import burnish
import pytest
import torch
import transformers
from burnish.nn import Int8Linear
from torch import nn

IDS = torch.arange(32).reshape(2, 16)
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}


def bert(act: str = "gelu") -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **SIZES, intermediate_size=128, max_position_embeddings=32, hidden_act=act, initializer_range=0.2
    )
    return transformers.BertModel(config).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=100, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config).eval()


def llama() -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, intermediate_size=128)).eval()


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS)[0]


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool(nn.functional.cosine_similarity(one.float(), other.float(), dim=-1).min() > 0.99)


def test_bert_swaps_fuses_and_reverts() -> None:
    model = bert()
    before = {fqn: id(module) for fqn, module in model.named_modules()}
    expected = output(model)
    report = burnish.swap_(model, burnish.Int8())
    assert len(report.swapped) == 13
    assert report.fused == tuple(f"encoder.layer.{i}.intermediate.intermediate_act_fn" for i in range(2))
    assert model.encoder.layer[0].intermediate.dense.activation == "gelu"
    assert isinstance(model.encoder.layer[0].intermediate.intermediate_act_fn, nn.Identity)
    assert not [m for m in model.modules() if isinstance(m, nn.Linear)]
    swapped = output(model)
    assert close(swapped, expected)
    text = str(report)
    assert "encoder.layer.{0..1}.attention.self.query" in text
    assert "takes in 'intermediate_act_fn'" in text
    report.revert()
    assert {fqn: id(module) for fqn, module in model.named_modules()} == before
    assert torch.equal(output(model), expected)
    burnish.swap_(model, burnish.Int8())
    assert torch.equal(output(model), swapped)


def test_bert_fused_is_bert_unfused() -> None:
    fused, plain = bert(), bert()
    burnish.swap_(fused, burnish.Int8())
    assert burnish.swap_(plain, burnish.Int8(fuse_activation=False)).fused == ()
    torch.testing.assert_close(output(fused), output(plain), rtol=1e-3, atol=2e-2)


@pytest.mark.parametrize(("act", "expected"), [
    ("gelu", "gelu"), ("gelu_python", "gelu"), ("gelu_new", "gelu_tanh"), ("gelu_pytorch_tanh", "gelu_tanh"),
    ("silu", "silu"), ("swish", "silu"), ("relu", "relu"), ("quick_gelu", "none"), ("gelu_fast", "none"),
    ("mish", "none"), ("relu6", "none"), ("tanh", "none"), ("gelu_10", "none"),
])  # fmt: skip
def test_only_the_same_activation_is_fused(act: str, expected: str) -> None:
    fused, plain = bert(act), bert(act)
    report = burnish.swap_(fused, burnish.Int8())
    burnish.swap_(plain, burnish.Int8(fuse_activation=False))
    assert fused.encoder.layer[0].intermediate.dense.activation == expected
    assert len(report.fused) == (0 if expected == "none" else 2)
    assert close(output(fused), output(plain))


def test_gpt2_swaps_conv1d_and_keeps_the_tied_head() -> None:
    model = gpt2()
    expected = output(model)
    report = burnish.swap_(model, burnish.Int8())
    assert len(report.swapped) == 8
    assert {row.was.split()[0] for row in report.swapped} == {"Conv1D"}
    assert report.fused == ("transformer.h.0.mlp.act", "transformer.h.1.mlp.act")
    head = next(row for row in report.kept if row.fqn == "lm_head")
    assert head.reason == "its weight is tied to Embedding 'transformer.wte', which is kept"
    assert model.transformer.h[0].attn.c_attn.nf == 192
    assert close(output(model), expected)
    report.revert()
    assert torch.equal(output(model), expected)


def test_llama_fuses_the_gate() -> None:
    model = llama()
    expected = output(model)
    report = burnish.swap_(model, {"lm_head": burnish.Keep(), "*": burnish.Int8()})
    assert len(report.swapped) == 14
    assert report.fused == ("model.layers.0.mlp.act_fn", "model.layers.1.mlp.act_fn")
    assert model.model.layers[0].mlp.gate_proj.activation == "silu"
    assert close(output(model), expected)


def test_vit_swaps_and_runs() -> None:
    vit = transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=96,
            image_size=32,
            patch_size=16,
        )
    ).eval()
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = vit(image)[0]
        report = burnish.swap_(vit, burnish.Int8())
        assert len(report.swapped) == 7
        assert close(vit(image)[0], expected)
    assert len(report.fused) == 1


@pytest.mark.parametrize("make", [bert, gpt2, llama])
def test_low_rank_layers_that_know_the_inputs_come_closer(make, tmp_path: Path) -> None:
    expected = output(make())
    calibration = burnish.calibrate(make(), [{"input_ids": IDS}])
    missed = []
    for method in ("svd", "activation"):
        model = make()
        report = burnish.swap_(model, burnish.LowRank(rank=24, method=method), calibration=calibration)
        assert {row.became for row in report.swapped} == {"LowRankLinear r=24"}
        missed.append(float((output(model) - expected).norm() / expected.norm()))
    assert missed[1] < 0.8 * missed[0]
    burnish.save(model, tmp_path)
    assert torch.equal(output(burnish.load(make, tmp_path)), output(model))


def test_layers_whose_weight_the_model_reads_are_kept() -> None:
    """Mamba multiplies by the weights of some of its layers itself, and would not see an adapter on them."""
    torch.manual_seed(0)
    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=99)
    model = transformers.MambaForCausalLM(config).eval()
    expected = output(model)
    report = burnish.swap_(model, {"*mixer*": burnish.LoRA(r=4, init_lora_weights="pissa")})
    assert {row.fqn.rpartition(".")[2] for row in report.swapped} == {"in_proj"}
    reasons = {row.fqn: row.reason for row in report.kept}
    assert reasons["backbone.layers.0.mixer.dt_proj"] == "MambaMixer reads its weight directly"
    torch.testing.assert_close(output(model), expected, rtol=1e-5, atol=1e-5)


def test_a_head_that_an_adapter_untied_is_saved_and_loaded(tmp_path: Path) -> None:
    model = gpt2()
    assert model.lm_head.weight is model.transformer.wte.weight
    burnish.swap_(model, burnish.LoRA(r=4, init_lora_weights="pissa"))
    expected = output(model)
    burnish.save(model, tmp_path)
    for loaded in (burnish.load(gpt2, tmp_path), burnish.load(model, tmp_path)):
        assert torch.equal(output(loaded), expected)
        assert not torch.equal(loaded.lm_head.weight, loaded.transformer.wte.weight)
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("make", [bert, gpt2, llama])
def test_save_and_load(make, tmp_path: Path) -> None:
    model = make()
    burnish.swap_(model, burnish.Int8())
    if make is not llama:  # whose bfloat16() also rounds the rotary frequencies, which no state dict has
        model.bfloat16()
    expected = output(model)
    burnish.save(model, tmp_path)
    loaded = burnish.load(make, tmp_path)
    assert torch.equal(output(loaded), expected)
    assert {fqn: type(m) for fqn, m in loaded.named_modules()} == {fqn: type(m) for fqn, m in model.named_modules()}
    assert [fqn for fqn, m in loaded.named_modules() if isinstance(m, Int8Linear)]
    if make is gpt2:
        assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_measure_by_keywords() -> None:
    model = bert()
    report = burnish.swap_(model, {"*.intermediate.dense": burnish.Int8()}, measure={"input_ids": IDS})
    assert {row.times.rows for row in report.rows if row.times} == {32}
