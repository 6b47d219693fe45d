"""Hugging Face folders both ways: `transformers` computes the same logits and gradients, and what it saves is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gristmill.model.config import ModelConfig, RotaryScalingConfig
from gristmill.model.costs import parameter_counts
from gristmill.model.decoding import Decoder, padded_prompts
from gristmill.model.hugging_face import conversion
from gristmill.model.hugging_face.configs import FP8, from_hugging_face, to_hugging_face
from gristmill.model.hugging_face.folders import INDEX, TensorFolder
from gristmill.model.hugging_face.fp8 import dequantised, quantised
from gristmill.model.hugging_face.names import layout
from gristmill.model.training.models import load_model
from gristmill.model.transformer import Batch, Transformer, rotary_angles

VOCAB = 96
SMALL = ModelConfig(
    hidden_size=32, num_hidden_layers=4, num_attention_heads=4, kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=8, first_k_dense_replace=1, intermediate_size=48, n_routed_experts=8,
    num_experts_per_tok=2, moe_intermediate_size=16, max_position_embeddings=256, num_nextn_predict_layers=0,
)  # fmt: skip
YARN = RotaryScalingConfig(factor=8.0, original_max_position_embeddings=32)
DENSE = {
    "attention": "gqa", "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "first_k_dense_replace": 4, "intermediate_size": 48, "num_nextn_predict_layers": 0,
    "max_position_embeddings": 256,
}  # fmt: skip


DENSE_OF_SMALL = {"attention": "gqa", "first_k_dense_replace": 4}


def dense(**changes: Any) -> ModelConfig:
    return ModelConfig.model_validate({**DENSE, **changes})


def shape(**changes: Any) -> ModelConfig:
    return ModelConfig.model_validate({**SMALL.model_dump(), **changes})


SHAPES = {
    "v3": SMALL,
    "v3, query latent, 8 groups of 2": shape(q_lora_rank=12, n_routed_experts=16, n_group=8, topk_group=4),
    "v3, 2 shared, 4 groups, 3 dense": shape(n_shared_experts=2, n_group=4, topk_group=2, first_k_dense_replace=3),
    "v3, all MoE, scaled gates, 2 groups": shape(first_k_dense_replace=0, routed_scaling_factor=2.5, n_group=2),
    "v3, gates not normalised, 2 dense": shape(norm_topk_prob=False, first_k_dense_replace=2, v_head_dim=12),
    "v3, another ε": shape(rms_norm_eps=1e-3, q_lora_rank=12),
    "v3, YaRN": shape(rope_scaling=YARN, q_lora_rank=12),
    "v3, YaRN of unequal amplitudes": shape(rope_scaling=YARN.model_copy(update={"mscale": 0.7, "beta_fast": 8.0})),
    "v2, greedy": shape(scoring_func="softmax", bias_update_speed=0.0, norm_topk_prob=False, n_shared_experts=2),
    "v2, 4 groups, query latent, YaRN": shape(
        scoring_func="softmax", bias_update_speed=0.0, norm_topk_prob=False, n_group=4, topk_group=2, q_lora_rank=12, rope_scaling=YARN,
        routed_scaling_factor=16.0,
    ),
    "llama": dense(),
    "llama 3, tied": dense(
        tie_word_embeddings=True,
        rope_scaling=RotaryScalingConfig(type="llama3", factor=8.0, original_max_position_embeddings=32),
    ),
    "qwen 2": dense(qkv_bias=True),
    "qwen 3, YaRN": dense(qk_norm=True, rope_scaling=YARN.model_copy(update={"mscale_all_dim": 0.0})),
    "qwen 3, tied": dense(head_dim=16, qk_norm=True, tie_word_embeddings=True, rope_theta=1e6),
}  # fmt: skip

# float32: logits of order ten out of sums of at most a few dozen terms a layer, in another order: some hundred ulp.
CLOSE = {"rtol": 1e-4, "atol": 2e-4}


def build(config: ModelConfig, seed: int = 3) -> Transformer:
    """A model whose weights are large enough that attention and routing matter."""
    model = Transformer(config, VOCAB)
    model.initialise(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1 and (config.tie_word_embeddings or "embed" not in name):
                p.mul_(6)
            elif p.ndim == 1:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
        if config.scoring_func == "sigmoid":
            for mixture in model.mixtures():
                mixture.gate.e_score_correction_bias.normal_(0, 0.1, generator=generator)
    return model.eval()


def transformers_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def write(model: Transformer, folder: Path, **how: Any) -> int:
    return conversion.export(conversion.of_model(model), model.config, model.vocab_size, folder, **how)


def tokens(*size: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, size, generator=torch.Generator().manual_seed(0))


def plain(token_BS: torch.Tensor) -> Batch:
    return Batch(token_BS, torch.arange(token_BS.shape[1]).expand_as(token_BS))


@pytest.fixture(scope="module", params=SHAPES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Transformer, Any, Path]:
    """A random model of each shape, `transformers`' reading of it, and the folder."""
    folder = tmp_path_factory.mktemp("exported")
    model = build(SHAPES[request.param])
    assert write(model, folder, shard_megabytes=1) >= 1
    return model, transformers_model(folder), folder


def test_logits_at_once_cached_and_padded(pair: tuple[Transformer, Any, Path]) -> None:
    model, theirs, _ = pair
    token_BS = tokens(2, 48)
    ours_BSV = model(plain(token_BS))
    with torch.no_grad():
        theirs_BSV = theirs(token_BS).logits
        torch.testing.assert_close(ours_BSV, theirs_BSV, **CLOSE)
        assert float(theirs_BSV.std()) > 0.3  # large enough that a wrong scale or a wrong expert shows

        decoder = Decoder(model)
        cache, own = None, decoder.cache(2, 48)
        for place in range(48):
            one_BS = token_BS[:, place : place + 1]
            out = theirs(one_BS, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            mine_BV = decoder.logits(decoder.advance(one_BS, torch.full((2,), place), own)[:, -1])
            torch.testing.assert_close(mine_BV, out.logits[:, 0], **CLOSE)

        # the second sequence is shorter: padded on the left for them, on the right for us
        padded_BS, seen_BS = token_BS.clone(), torch.ones_like(token_BS)
        padded_BS[1, :9], seen_BS[1, :9] = 0, 0
        position_BS = (seen_BS.cumsum(1) - 1).clamp_min(0)
        expected_BV = theirs(padded_BS, attention_mask=seen_BS, position_ids=position_BS).logits[:, -1]
        right_BS, length_B = padded_prompts([token_BS[0].tolist(), token_BS[1, 9:].tolist()], 0, token_BS.device)
        hidden_BSD = decoder.advance(right_BS, torch.zeros_like(length_B), decoder.cache(2, 48))
        mine_BV = decoder.logits(hidden_BSD[torch.arange(2), length_B - 1])
        torch.testing.assert_close(mine_BV, expected_BV, **CLOSE)


def test_gradients(pair: tuple[Transformer, Any, Path]) -> None:
    model, theirs, _ = pair
    token_BS = tokens(2, 24)
    seen_BSV = torch.randn(2, 24, VOCAB, generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    theirs.zero_grad()
    (model(plain(token_BS)) * seen_BSV).sum().backward()
    (theirs(token_BS).logits * seen_BSV).sum().backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    compared = 0
    own = dict(model.named_parameters())
    for name, (_, pieces) in layout(model.config, VOCAB).items():
        if name not in own:
            continue  # the gates' bias learns by its own rule
        grad = own[name].grad
        assert grad is not None, name
        found = (
            [(f"model.{name}", grad)] if f"model.{name}" in expected else [(p.name, grad[p.place()]) for p in pieces]
        )
        for over_there, mine in found:
            want = expected[over_there]
            assert want is not None, over_there
            # sums over 48 tokens of products that cancel: measured against the largest entry, not each by itself
            torch.testing.assert_close(mine, want, rtol=1e-3, atol=2e-5 * float(want.abs().max()) + 1e-5)
            compared += 1
    assert compared >= len(own)


def test_what_was_written_is_read_again(pair: tuple[Transformer, Any, Path], tmp_path: Path) -> None:
    model, _, folder = pair
    again = conversion.load(folder)
    assert again.config == model.config
    for (name, ours), theirs in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    conversion.import_folder(folder, tmp_path, dtype=torch.float32, shard_megabytes=1)
    imported = load_model(tmp_path, torch.device("cpu"))
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), imported.state_dict().values(), strict=True)
    )
    with TensorFolder(tmp_path) as found:
        conversion.export(conversion.of_folder(found), model.config, VOCAB, tmp_path / "out", shard_megabytes=1)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == {
        p.name: p.read_bytes() for p in folder.iterdir()
    }


def test_what_transformers_saves_is_read(pair: tuple[Transformer, Any, Path], tmp_path: Path) -> None:
    model, theirs, _ = pair
    theirs.save_pretrained(tmp_path)
    again = conversion.load(tmp_path)
    assert torch.equal(again(plain(tokens(1, 20))), model(plain(tokens(1, 20))))


def test_mtp_modules_travel_and_transformers_drafts_alike(tmp_path: Path) -> None:
    config = shape(num_nextn_predict_layers=2, first_k_dense_replace=1)
    model = build(config)
    write(model, tmp_path, mtp=True)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert {
        f"model.layers.{n}.{rest}" for n in (4, 5) for rest in ("eh_proj.weight", "shared_head.norm.weight")
    } <= names
    again = conversion.load(tmp_path)
    assert again.config == config
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert conversion.load(tmp_path, mtp=False).config.num_nextn_predict_layers == 0

    from transformers.modeling_layers import MtpModel

    # Its own loader knows the modules by the number 61 of the released model's layer, so it is given the tensors here.
    theirs = transformers_model(tmp_path)
    drafter = MtpModel(theirs, 2).eval()
    held = {}
    for name, tensor in model.mtp.state_dict().items():
        number, rest = name.split(".", 1)
        rest = rest.replace("block.", "mtp_block.", 1) if rest.startswith("block.") else rest
        rest = "post_norm.weight" if rest == "norm.weight" else rest
        if "shared_experts.gate_up_proj" in rest:
            for part, half in zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True):
                held[f"layers.{number}.{rest.replace('gate_up_proj', part)}"] = half
        else:
            held[f"layers.{number}.{rest}"] = tensor
    missing, unexpected = drafter.load_state_dict(held, strict=False)
    assert not unexpected
    assert all(not name.startswith("layers.") for name in missing)
    token_BS = tokens(2, 20)
    position = torch.arange(18)[None].expand(2, -1)
    mask = torch.full((18, 18), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        expected_BSD = theirs.model(token_BS).last_hidden_state[:, :18]
        own_BSD = model.norm(model.hidden(plain(token_BS[:, :18])))
        for depth in (1, 2):
            inputs = drafter.embed_tokens(token_BS[:, depth : depth + 18])
            rotary = drafter.rotary_emb(inputs, position)
            expected_BSD = drafter.layers[depth - 1](inputs, expected_BSD, rotary, mask, position, None)
            next_BSD = model.embed_tokens(token_BS[:, depth : depth + 18])
            own_BSD = model.mtp[depth - 1](own_BSD, next_BSD, rotary_angles(config, position), None, None)
            torch.testing.assert_close(own_BSD, expected_BSD, **CLOSE)


def test_fp8_blocks() -> None:
    weight_OI = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    weight_OI[:128, :128] *= 1e4
    weight_OI[128:256, 128:] = 0
    values, scale = quantised(weight_OI)
    assert values.dtype == torch.float8_e4m3fn
    assert scale.shape == (3, 2)
    back_OI = dequantised(values, scale, torch.float32)
    # E4M3 has 3 bits of mantissa: half a step is 1/16 of a normal number; below 2⁻⁶ the step is 2⁻⁹, scaled
    bound = (weight_OI.abs() / 16).maximum(
        scale.repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)[:, :200] * 2**-10
    )
    assert bool(((back_OI - weight_OI).abs() <= bound * 1.001).all())
    assert float((back_OI - weight_OI).abs().max()) > 0
    assert torch.equal(quantised(back_OI)[0].float(), values.float())  # what was read is written as it was
    with pytest.raises(ValueError, match=r"scales of shape \(3, 2\)"):
        dequantised(values[:128], scale, torch.float32)


def test_an_fp8_folder_holds_and_gives_what_its_blocks_say(tmp_path: Path) -> None:
    config = shape(hidden_size=160, moe_intermediate_size=144, q_lora_rank=136)
    model = build(config)
    write(model, tmp_path, fp8=True, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["weight_block_size"] == [128, 128]
    held, own = load_file(tmp_path / "model.safetensors"), conversion.load(tmp_path).state_dict()
    in_fp8 = {name for name, tensor in held.items() if tensor.dtype == torch.float8_e4m3fn}
    pieces = {p.name: (ours, p) for ours, (_, found) in layout(config, VOCAB).items() for p in found}
    assert in_fp8 == {name for name in pieces if name.endswith(("_proj.weight", "_with_mqa.weight"))}
    assert len(in_fp8) == 4 * 5 + 3 + 3 * 3 * (
        8 + 1
    )  # attention; a dense block; experts and the shared one of 3 blocks
    for name, (ours, piece) in pieces.items():
        given = own[ours][piece.place()]
        original = model.state_dict()[ours][piece.place()]
        if name not in in_fp8:
            assert held[name].dtype == (torch.float32 if "bias" in name else torch.bfloat16)
            assert torch.equal(given, held[name].float())
            continue
        scale = held[f"{name}_scale_inv"]
        assert scale.dtype == torch.float32
        expected = held[name].float()
        for i in range(scale.shape[0]):  # block by block: value times the scale of its block, rounded to bfloat16
            for j in range(scale.shape[1]):
                expected[i * 128 : i * 128 + 128, j * 128 : j * 128 + 128] *= scale[i, j]
        assert torch.equal(given, expected.bfloat16().float())
        # half a step of E4M3 (1/16), half a step of bfloat16, and where values are below the smallest normal one
        torch.testing.assert_close(given, original, rtol=1 / 15, atol=float(original.abs().max()) / 448 / 16)


def test_several_files_and_their_index_are_written_and_read(tmp_path: Path) -> None:
    """Of a model of some megabytes, so that the smallest size of a file makes several."""
    model = build(shape(hidden_size=192, moe_intermediate_size=96, intermediate_size=256))
    files = write(model, tmp_path, shard_megabytes=1)
    assert files >= 3
    names = [f"model-{i + 1:05d}-of-{files:05d}.safetensors" for i in range(files)]
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == names
    index = json.loads((tmp_path / INDEX).read_text())
    held = {name: load_file(tmp_path / name) for name in names}
    assert index["weight_map"] == {tensor: name for name in names for tensor in held[name]}
    sizes = [sum(t.nbytes for t in tensors.values()) for tensors in held.values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert max(sizes) <= 1_000_000
    again, token_BS = conversion.load(tmp_path), tokens(2, 24)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    with torch.no_grad():
        ours_BSV, theirs_BSV = again(plain(token_BS)), transformers_model(tmp_path)(token_BS).logits
        assert torch.equal(ours_BSV, model(plain(token_BS)))
    torch.testing.assert_close(ours_BSV, theirs_BSV, **CLOSE)


def test_an_fp8_folder_written_by_hand_is_read_exactly(tmp_path: Path) -> None:
    """In the layout of DeepSeek's release: `weight` in E4M3, `weight_scale_inv` float32, one a block of 128 × 128."""
    config = shape(hidden_size=160, moe_intermediate_size=144, q_lora_rank=136, num_hidden_layers=2)
    generator = torch.Generator().manual_seed(0)
    held: dict[str, torch.Tensor] = {}
    expected: dict[str, torch.Tensor] = {}
    for pieces in (pieces for _, pieces in layout(config, VOCAB).values()):
        for piece in pieces:
            stored = torch.randn(piece.shape, generator=generator)
            if not piece.name.endswith(("_proj.weight", "_with_mqa.weight")):
                held[piece.name] = stored if "bias" in piece.name else stored.bfloat16()
                expected[piece.name] = held[piece.name].float()
                continue
            held[piece.name] = (100 * stored).to(torch.float8_e4m3fn)
            rows, columns = (-(-size // 128) for size in piece.shape)
            scale = torch.rand(rows, columns, generator=generator) / 1000
            held[f"{piece.name}_scale_inv"] = scale
            spread = scale.repeat_interleave(128, 0)[: piece.shape[0]].repeat_interleave(128, 1)[:, : piece.shape[1]]
            expected[piece.name] = (held[piece.name].float() * spread).bfloat16().float()
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    quantisation = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    described = {**to_hugging_face(config, VOCAB), "quantization_config": quantisation}
    (tmp_path / "config.json").write_text(json.dumps(described))
    assert any(scale.shape[0] > 1 and scale.shape[1] > 1 for name, scale in held.items() if name.endswith("_scale_inv"))
    own = conversion.load(tmp_path).state_dict()
    for ours, (_, pieces) in layout(config, VOCAB).items():
        for piece in pieces:
            assert torch.equal(own[ours][piece.place()], expected[piece.name]), piece.name


def test_scales_that_are_missing_or_misshapen_are_listed(tmp_path: Path) -> None:
    write(build(SMALL), tmp_path, fp8=True)
    held = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.weight"
    del held[f"{name}_scale_inv"]
    held["model.layers.0.mlp.down_proj.weight_scale_inv"] = torch.ones(3, 3)
    held["model.norm.weight_scale_inv"] = torch.ones(1)
    del held["model.norm.weight"]
    save_file(held, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="in 4 tensors") as error:
        conversion.load(tmp_path)
    for part in (
        f"missing {name}_scale_inv (1, 1)",
        "model.layers.0.mlp.down_proj.weight_scale_inv is (3, 3), expected (1, 1)",
        "left over model.norm.weight_scale_inv",
        "missing model.norm.weight (32,)",
    ):
        assert part in str(error.value)


def test_all_that_is_wrong_with_a_folder_is_listed_at_once(tmp_path: Path) -> None:
    write(build(SMALL), tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    del held["model.layers.1.mlp.gate.weight"]
    held["model.norm.weight"] = torch.ones(7)
    held["model.layers.2.more"] = torch.ones(2)
    save_file(held, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="in 3 tensors") as error:
        conversion.load(tmp_path)
    for part in (
        "missing model.layers.1.mlp.gate.weight (8, 32)",
        "left over model.layers.2.more",
        "model.norm.weight is (7,), expected (32,)",
    ):
        assert part in str(error.value)


def test_damaged_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        conversion.load(tmp_path)
    write(build(SMALL), tmp_path, shard_megabytes=1)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-5])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        conversion.load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds neither"):
        conversion.load(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "one", "b": "two"}}))
    with pytest.raises(ValueError, match="names files that are not there: one, two"):
        conversion.load(tmp_path)
    for damaged in ('{"weight_', "{}", "[]"):
        (tmp_path / INDEX).write_text(damaged)
        with pytest.raises(ValueError, match=r"index\.json is damaged"):
            conversion.load(tmp_path)
    save_file({"other": torch.ones(1)}, tmp_path / "some.safetensors")
    weights = dict.fromkeys((p.name for _, pieces in layout(SMALL, VOCAB).values() for p in pieces), "some.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weights}))
    with pytest.raises(ValueError, match=r"some\.safetensors lacks model\."):
        conversion.load(tmp_path)


YARN_THERE = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "field", ["n_group", "routed_scaling_factor", "num_experts_per_tok", "q_lora_rank", "vocab_size"]
)
def test_what_is_not_said_is_not_guessed(field: str) -> None:
    described = to_hugging_face(SMALL, VOCAB)
    del described[field]
    with pytest.raises(ValueError, match=f"lacks {field}"):
        from_hugging_face(described)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mixtral"}, "'mixtral' is not one of"),
        ({"quantization_config": {**FP8, "weight_block_size": [64, 64]}}, r"weight_block_size \[64, 64\]"),
        ({"quantization_config": {**FP8, "weight_block_size": None}}, "weight_block_size None"),
        ({"quantization_config": {**FP8, "fmt": "e5m2"}}, "fmt 'e5m2', and 'e4m3' alone can be read"),
        ({"quantization_config": {**FP8, "quant_method": "gptq"}}, "quant_method 'gptq'"),
        ({"quantization_config": {}}, "quant_method None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "'linear' is neither yarn nor llama3"),
        ({"rope_interleave": False}, "rope_interleave is False"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "lacks original_max_position_embeddings"),
        ({"rope_scaling": {**YARN_THERE, "attention_factor": 1.3}}, "attention_factor 1.3"),
        ({"rope_scaling": {**YARN_THERE, "truncate": False}}, "truncate False"),
        ({"rope_scaling": {**YARN_THERE, "mscale_all_dim": 1}}, "mscale_all_dim without mscale"),
        ({"rope_scaling": {**YARN_THERE, "mscale": 0.7}}, "without mscale_all_dim"),
        ({"model_type": "deepseek_v2", "scoring_func": "softmax"}, "norm_topk_prob is True"),
        ({"model_type": "deepseek_v2", "scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'"),
    ],
)
def test_configurations_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_hugging_face({**to_hugging_face(SMALL, VOCAB), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_shared_experts": 0}, "n_shared_experts is 0"),
        ({"scoring_func": "softmax", "bias_update_speed": 0.0}, "norm_topk_prob with a softmax gate"),
        ({"num_nextn_predict_layers": 1, **DENSE_OF_SMALL}, "num_nextn_predict_layers 1 has no place in Llama"),
        ({"attention": "gqa"}, "gqa with experts"),
    ],
)
def test_shapes_without_a_form_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_hugging_face(shape(**change), VOCAB)


def test_counts_are_those_of_the_tensors() -> None:
    for config in SHAPES.values():
        held = sum(p.numel() for p in Transformer(config, VOCAB).parameters())
        assert parameter_counts(config, VOCAB)[0] == held
