"""The architecture against plain computations of the same equations."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.model.config import ModelConfig, RotaryScalingConfig
from gristmill.model.costs import parameter_counts
from gristmill.model.decoding import Decoder
from gristmill.model.training.batches import first_within, packed_inputs
from gristmill.model.transformer import Batch, Gate, MixtureOfExperts, Routing, Transformer, rotary_angles

# float32 sums of at most a few hundred terms of order one, in another order: a few hundred ulp of 1.2e-7.
CLOSE = {"rtol": 2e-4, "atol": 2e-5}

SHAPES = {
    "tiny": ModelConfig(),
    "query latent, groups": ModelConfig(
        q_lora_rank=48,
        n_routed_experts=16,
        n_group=4,
        topk_group=2,
        num_experts_per_tok=4,
        n_shared_experts=2,
    ),
    "no dense layer, scaled gates": ModelConfig(first_k_dense_replace=0, routed_scaling_factor=2.5),
    "unnormalised gates, other value width": ModelConfig(norm_topk_prob=False, v_head_dim=24),
    "few of many experts": ModelConfig(n_routed_experts=24, num_experts_per_tok=4, n_shared_experts=2),
    "no shared expert": ModelConfig(n_shared_experts=0),
    "softmax gate": ModelConfig(
        scoring_func="softmax", bias_update_speed=0.0, norm_topk_prob=False, n_routed_experts=8, n_group=4, topk_group=2
    ),
    "long context": ModelConfig(
        rope_scaling=RotaryScalingConfig(factor=4.0, original_max_position_embeddings=64, mscale=0.7)
    ),
    "grouped queries": ModelConfig(
        attention="gqa",
        num_key_value_heads=2,
        qk_norm=True,
        qkv_bias=True,
        tie_word_embeddings=True,
        first_k_dense_replace=4,
        num_nextn_predict_layers=0,
        rope_scaling=RotaryScalingConfig(type="llama3", factor=8.0, original_max_position_embeddings=64),
    ),
    "dense throughout": ModelConfig(first_k_dense_replace=4, num_nextn_predict_layers=0),
}


def build(config: ModelConfig, vocab_size: int = 97, spread: float = 1.0) -> Transformer:
    """A model whose weights are large enough that routing and attention matter."""
    model = Transformer(config, vocab_size)
    model.initialise(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1 and "embed" not in name:
                p.mul_(spread * 3)
        for mixture in model.mixtures():
            mixture.gate.e_score_correction_bias.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    return model.eval()


def plain(token_BS: torch.Tensor) -> Batch:
    return Batch(token_BS, torch.arange(token_BS.shape[1]).expand_as(token_BS))


@pytest.mark.parametrize("torch_alone", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_cached_decoding_equals_the_full_forward(
    shape: str, torch_alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one call where the layers compile, and operation by operation."""
    monkeypatch.setattr("gristmill.kernels.compiled.TORCH_ALONE", torch_alone)
    config = SHAPES[shape]
    model = build(config)
    token_BS = torch.randint(0, 97, (3, 12), generator=torch.Generator().manual_seed(0))
    whole_BSV = model(plain(token_BS))
    decoder = Decoder(model)
    cache = decoder.cache(3, 12)
    if config.attention == "mla":
        assert cache.latent_LBSC.shape[-1] == config.kv_lora_rank + config.qk_rope_head_dim
    hidden = [decoder.advance(token_BS[:, :5], torch.zeros(3, dtype=torch.long), cache)]
    for place in range(5, 12):
        hidden.append(decoder.advance(token_BS[:, place : place + 1], torch.full((3,), place), cache))
    torch.testing.assert_close(decoder.logits(torch.cat(hidden, 1)), whole_BSV, **CLOSE)


@pytest.mark.parametrize("shape", ["tiny", "query latent, groups", "unnormalised gates, other value width"])
def test_experts_equal_a_loop_over_tokens(shape: str) -> None:
    config = SHAPES[shape]
    moe = next(iter(build(config).mixtures()))
    x_BSD = torch.randn(2, 7, config.hidden_size, generator=torch.Generator().manual_seed(4)).requires_grad_()
    out = moe(x_BSD, None)
    expected = _loop(moe, x_BSD)
    torch.testing.assert_close(out, expected, **CLOSE)
    seen = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    parameters = [x_BSD, *moe.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad(out, parameters, seen),
        torch.autograd.grad(expected, parameters, seen),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)  # sums over 14 tokens of products of the above


def _loop(moe: MixtureOfExperts, x_BSD: torch.Tensor) -> torch.Tensor:
    """Equations 12–16 of V3, one token after the other."""
    config, rows = moe.config, []
    for x_D in x_BSD.reshape(-1, x_BSD.shape[-1]):
        affinity = torch.sigmoid(moe.gate.weight @ x_D)
        biased = affinity.detach() + moe.gate.e_score_correction_bias
        groups = biased.view(config.n_group, -1)
        best = sorted(range(config.n_group), key=lambda g: -float(groups[g].topk(2).values.sum()))
        size = config.n_routed_experts // config.n_group
        allowed = [e for g in best[: config.topk_group] for e in range(g * size, (g + 1) * size)]
        chosen = sorted(allowed, key=lambda e: -float(biased[e]))[: config.num_experts_per_tok]
        gates = torch.stack([affinity[e] for e in chosen])
        if config.norm_topk_prob:
            gates = gates / gates.sum()
        out = torch.zeros_like(x_D)
        for gate, expert in zip(gates * config.routed_scaling_factor, chosen, strict=True):
            a, b = (moe.experts.gate_up_proj[expert] @ x_D).chunk(2)
            out = out + gate * (moe.experts.down_proj[expert] @ (F.silu(a) * b))
        if moe.shared_experts is not None:
            out = out + moe.shared_experts(x_D)
        rows.append(out)
    return torch.stack(rows).view_as(x_BSD)


def test_bias_balancing_moves_the_load_toward_uniform() -> None:
    config = ModelConfig(n_routed_experts=8, num_experts_per_tok=2, bias_update_speed=0.02)
    moe = MixtureOfExperts(config)
    generator = torch.Generator().manual_seed(6)
    for p in moe.parameters():
        torch.nn.init.normal_(p, 0, 0.1, generator=generator)
    tilt = torch.randn(config.hidden_size, generator=generator)  # a common direction, so that some experts are favoured
    x = torch.randn(4, 64, config.hidden_size, generator=generator) + tilt
    violations = []
    for _ in range(150):
        routing = Routing()
        moe(x, routing)
        load = routing.load_LE[0]
        assert int(load.sum()) == 4 * 64 * config.num_experts_per_tok  # no token is dropped
        violations.append(float(load.max() / load.float().mean() - 1))
        moe.update_bias(load)
    assert violations[0] > 0.8
    assert violations[-1] < 0.3 * violations[0]


def test_balance_loss_is_least_when_uniform_and_matches_the_equations() -> None:
    config = ModelConfig(n_routed_experts=4, num_experts_per_tok=2, balance_loss_alpha=0.5)
    moe = MixtureOfExperts(config)
    score = torch.rand(2 * 6, 4, generator=torch.Generator().manual_seed(7))
    expert = score.topk(2).indices
    expected = 0.0
    for s in range(2):
        rows = range(s * 6, s * 6 + 6)
        for i in range(4):
            f = sum(int(i in expert[t]) for t in rows) * 4 / (2 * 6)
            p = sum(float(score[t, i] / score[t].sum()) for t in rows) / 6
            expected += 0.5 * f * p / 2
    assert math.isclose(float(moe.balance_loss(score, expert, 2)), expected, rel_tol=1e-5)


@pytest.mark.parametrize("depth", [1, 3])
def test_mtp_loss_equals_a_direct_computation(depth: int) -> None:
    config = SHAPES["tiny"].model_copy(update={"num_nextn_predict_layers": depth})
    model = build(config)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():  # norms that are not one: on which side of them a state is taken must show
        for norm in (model.norm, *(module.norm for module in model.mtp)):
            norm.weight.copy_(torch.rand(norm.weight.shape, generator=generator) + 0.5)
    tokens = torch.randint(0, 97, (2, 16), generator=generator)
    batch = plain(tokens[:, :12])
    weight = torch.ones(2, 12)
    main, ahead = model.losses(batch, tokens[:, 1:13], tokens[:, 2:14], weight, Routing())
    logits = model(batch)
    torch.testing.assert_close(main, F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:13].flatten()), **CLOSE)
    hidden = model.norm(model.hidden(batch))
    expected = []
    for k, mtp in enumerate(model.mtp, 1):
        joined = torch.cat((mtp.enorm(model.embed_tokens(tokens[:, k : k + 12])), mtp.hnorm(hidden)), -1)
        made = mtp.block(joined @ mtp.eh_proj.weight.T, rotary_angles(config, batch.position_BS), None, None)
        hidden = mtp.norm(made)
        known = 12 - (k - 1)  # of module k, the target of the last k − 1 positions lies beyond what is given
        logits = model.lm_head(hidden[:, :known])
        expected.append(F.cross_entropy(logits.flatten(0, 1), tokens[:, k + 1 : k + 1 + known].flatten()))
    torch.testing.assert_close(torch.stack(ahead), torch.stack(expected), **CLOSE)


def test_a_packed_document_sees_no_other() -> None:
    model = build(SHAPES["tiny"])
    generator = torch.Generator().manual_seed(9)
    first, second = (
        torch.randint(0, 97, (1, 6), generator=generator),
        torch.randint(0, 97, (1, 7), generator=generator),
    )
    document = torch.tensor([[0] * 6 + [1] * 7])
    packed = packed_inputs(torch.cat((first, second), 1), document)
    logits = model(packed)
    torch.testing.assert_close(logits[:, :6], model(plain(first)), **CLOSE)
    torch.testing.assert_close(logits[:, 6:], model(plain(second)), **CLOSE)
    assert read_from_first(model, packed) == 0.0  # exactly: nothing of the first document is read
    assert read_from_first(model, Batch(packed.token_BS, torch.arange(13)[None], None)) > 0  # where all is seen, it is


def read_from_first(model: Transformer, batch: Batch) -> float:
    """How much the logits of positions 6 and on depend on the embeddings of the positions before."""
    embedded: list[torch.Tensor] = []
    hook = model.embed_tokens.register_forward_hook(lambda _m, _i, out: embedded.append(out) or out)
    logits = model(batch)
    hook.remove()
    (gradient,) = torch.autograd.grad(logits[:, 6:].square().sum(), embedded[0])
    return float(gradient[:, :6].abs().max())


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
@settings(max_examples=25, deadline=None)
def test_positions_restart_with_each_document(lengths: list[int]) -> None:
    document = torch.tensor([[d for d, n in enumerate(lengths) for _ in range(n)]])
    assert packed_inputs(document, document).position_BS.tolist() == [[i for n in lengths for i in range(n)]]
    for q, first in enumerate(first_within(document)[0].tolist()):
        assert list(range(first, q + 1)) == [k for k in range(q + 1) if document[0, k] == document[0, q]]


def test_group_limited_choice_stays_in_the_best_groups() -> None:
    config = SHAPES["query latent, groups"]
    gate = Gate(config)
    torch.nn.init.normal_(gate.weight, generator=torch.Generator().manual_seed(10))
    expert_TK, gate_TK, *_ = gate(torch.randn(50, config.hidden_size, generator=torch.Generator().manual_seed(11)))
    groups = expert_TK // (config.n_routed_experts // config.n_group)
    assert all(len(set(row)) <= config.topk_group for row in groups.tolist())
    torch.testing.assert_close(gate_TK.sum(1), torch.ones(50), **CLOSE)


V2_LITE = ModelConfig(
    hidden_size=2048, num_hidden_layers=27, num_attention_heads=16, q_lora_rank=None, kv_lora_rank=512,
    qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, first_k_dense_replace=1, intermediate_size=10944,
    n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6, moe_intermediate_size=1408, scoring_func="softmax",
    norm_topk_prob=False, bias_update_speed=0.0, max_position_embeddings=163_840, num_nextn_predict_layers=0,
)  # fmt: skip
V2 = V2_LITE.model_copy(
    update={
        "hidden_size": 5120, "num_hidden_layers": 60, "num_attention_heads": 128, "q_lora_rank": 1536,
        "intermediate_size": 12288, "n_routed_experts": 160, "n_group": 8, "topk_group": 3,
        "moe_intermediate_size": 1536, "routed_scaling_factor": 16.0,
    }
)  # fmt: skip
V3 = ModelConfig(
    hidden_size=7168, num_hidden_layers=61, num_attention_heads=128, q_lora_rank=1536, kv_lora_rank=512,
    qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, first_k_dense_replace=3, intermediate_size=18432,
    n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8, moe_intermediate_size=2048, n_group=8,
    topk_group=4, routed_scaling_factor=2.5, max_position_embeddings=163_840,
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "vocab_size", "total", "active"),
    [
        # arXiv 2405.04434: 15.7 B and 2.4 B (appendix B), 236 B and 21 B (abstract); arXiv 2412.19437: 671 B and 37 B
        pytest.param(V2_LITE, 102_400, 15.7, 2.4, id="16B"),
        pytest.param(V2, 102_400, 236, 21, id="236B"),
        pytest.param(V3, 129_280, 671, 37, id="671B"),
    ],
)
def test_published_sizes(config: ModelConfig, vocab_size: int, total: float, active: float) -> None:
    """Parameters in all and active a token, in billions, computed without storage.

    The published active counts leave out the embedding, of which a token reads one row; 2.45 B is printed there as 2.4.
    """
    assert ModelConfig.model_validate(config.model_dump()) == config  # a published shape is never refused
    own_total, own_active = parameter_counts(config, vocab_size)
    assert round(own_total / 1e9, 1 if total < 100 else 0) == total
    own_active -= vocab_size * config.hidden_size
    digits = 1 if active < 10 else 0
    assert active in (round(own_active / 1e9, digits), int(own_active / 1e9 * 10**digits) / 10**digits)
