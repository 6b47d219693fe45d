"""Muon and AdamW against plain computations."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from gristmill.kernels.optim import orthogonalised
from gristmill.model.config import ModelConfig
from gristmill.model.training.config import OptimizerConfig, ScheduleConfig
from gristmill.model.training.fused import Fused, fused_of
from gristmill.model.training.optimizers import MuonAdamW, Piece
from gristmill.model.training.schedules import factor
from gristmill.model.transformer import Transformer


def test_newton_schulz_brings_singular_values_near_one() -> None:
    stack = torch.randn(3, 24, 16, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalised(stack))
    # The quintic's fixed band: Keller Jordan gives 0.68 to 1.13 for its coefficients; five steps reach it for
    # singular values above about 0.03 of the norm.
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_a_stack_is_orthogonalised_matrix_by_matrix() -> None:
    stack = torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(1))
    together = orthogonalised(stack)
    for one, matrix in zip(together, stack, strict=True):
        torch.testing.assert_close(one, orthogonalised(matrix), rtol=1e-4, atol=1e-5)  # float32, another batch shape


def test_adam_part_equals_torch() -> None:
    ours = nn.Parameter(torch.randn(5, 7, generator=torch.Generator().manual_seed(2)))
    theirs = nn.Parameter(ours.detach().clone())
    config = OptimizerConfig(muon_learning_rate=0.0, adam_learning_rate=1e-2, weight_decay=0.1)
    mine = MuonAdamW([("w", ours)], config)
    reference = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(5):
        gradient = torch.randn(5, 7, generator=torch.Generator().manual_seed(10 + step))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.begin_step(1.0)
        mine.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)  # float32, five steps of elementwise arithmetic


def test_state_comes_back_by_name() -> None:
    def build() -> tuple[dict[str, nn.Parameter], MuonAdamW]:
        generator = torch.Generator().manual_seed(3)
        named = {n: nn.Parameter(torch.randn(s, generator=generator)) for n, s in {"a": (4, 6), "b": (6,)}.items()}
        return named, MuonAdamW(named.items(), OptimizerConfig())

    def advance(named: dict[str, nn.Parameter], optimizer: MuonAdamW, steps: range) -> None:
        for step in steps:
            for p in named.values():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            optimizer.begin_step(1.0)
            optimizer.step()

    straight, first = build()
    advance(straight, first, range(6))
    half, second = build()
    advance(half, second, range(3))
    resumed, third = build()
    for name, p in resumed.items():
        p.data.copy_(half[name])
    kept = {(kind, piece.name): numbers.clone() for kind, piece, numbers in second.moments()}
    third.load_moments(lambda kind, piece: kept.get((kind, piece.name)), second.steps_done)
    advance(resumed, third, range(3, 6))
    for name in straight:
        assert torch.equal(straight[name], resumed[name])


def test_schedule_warms_up_holds_and_decays() -> None:
    config = ScheduleConfig(warmup_steps=4, decay_fraction=0.5, final_ratio=0.1)
    factors = [factor(config, step, 20) for step in range(20)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert all(f == 1.0 for f in factors[4:10])
    assert all(a > b for a, b in itertools.pairwise(factors[9:]))
    assert abs(factors[-1] - 0.1) < 1e-12


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (8, 8), (3, 16, 8), (3, 8, 16)])
def test_muon_equals_a_plain_computation(shape: tuple[int, ...], moments: str) -> None:
    """Nesterov momentum, orthogonalised, times √max(1, rows / columns) of a single matrix, decoupled decay."""
    config = OptimizerConfig.model_validate({"muon_learning_rate": 0.02, "weight_decay": 0.1, "moments": moments})
    draw = torch.Generator().manual_seed(4)
    ours = nn.Parameter(torch.randn(shape, generator=draw))
    wanted, momentum = ours.detach().clone(), torch.zeros(shape)
    mine = MuonAdamW([("mlp.experts.gate_up_proj", ours)], config)
    for _ in range(4):
        gradient = torch.randn(shape, generator=draw)
        ours.grad = gradient.clone()
        mine.begin_step(0.5)
        mine.step()
        momentum = 0.95 * momentum + 0.05 * gradient
        update = orthogonalised(0.05 * gradient + 0.95 * momentum)
        if moments == "bfloat16":
            momentum = momentum.bfloat16().float()  # what is kept is rounded, what is used is not
        rate = 0.5 * config.muon_learning_rate
        wanted = wanted * (1 - rate * 0.1) - rate * max(1.0, shape[-2] / shape[-1]) ** 0.5 * update
    (state,) = mine.state.values()
    assert state["momentum"].dtype == getattr(torch, moments)
    # An update of order one, in float32 along another order of operations, of which 0.01 is taken four times. A momentum
    # that falls on the other side of a bfloat16's edge is off by 2⁻⁸ of itself, of which an update has 0.95 · 0.95.
    torch.testing.assert_close(ours.detach(), wanted, rtol=1e-5, atol={"float32": 1e-6, "bfloat16": 1e-4}[moments])


ROUNDED = OptimizerConfig(moments="bfloat16", moment_rounding="stochastic")
TENSORS = {"a.weight": (12, 10), "b.weight": (9, 7), "c.bias": (33,)}


def drawn(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in TENSORS.items()}


def stepped(named: dict[str, nn.Parameter], optimizer: MuonAdamW, steps: range) -> None:
    """Takes steps by gradients of their own, which the parameters' names or pieces say."""
    pieces = {tensor: held for group in optimizer.param_groups for tensor, held in group["pieces"].items()}
    for step in steps:
        gradients = drawn(100 + step)
        for tensor in named.values():
            flat = torch.zeros(tensor.numel())
            for piece in pieces[tensor]:
                piece.of(flat).copy_(gradients[piece.name].view(-1)[piece.start : piece.stop])
            tensor.grad = flat.view(tensor.shape)
        optimizer.begin_step(1.0)
        optimizer.step()


def moments_of(optimizer: MuonAdamW) -> dict[tuple[str, str, int], torch.Tensor]:
    return {(kind, piece.name, piece.start): numbers.clone() for kind, piece, numbers in optimizer.moments()}


def trained(config: OptimizerConfig, seed: int = 3, steps: int = 6) -> tuple[dict[str, nn.Parameter], MuonAdamW]:
    named = {name: nn.Parameter(tensor) for name, tensor in drawn(0).items()}
    optimizer = MuonAdamW(named.items(), config, seed=seed)
    stepped(named, optimizer, range(steps))
    return named, optimizer


@pytest.mark.parametrize("muon", [0.0, 0.02])
def test_moments_rounded_stochastically_go_on_to_the_bit_and_differ_by_seed(muon: float) -> None:
    config = ROUNDED.model_copy(update={"muon_learning_rate": muon})
    straight, first = trained(config)
    half, second = trained(config, steps=3)
    resumed = {name: nn.Parameter(p.detach().clone()) for name, p in half.items()}
    third, kept = MuonAdamW(resumed.items(), config, seed=3), moments_of(second)
    third.load_moments(lambda kind, piece: kept.get((kind, piece.name, piece.start)), second.steps_done)
    stepped(resumed, third, range(3, 6))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    for other in (trained(config, seed=4)[1], trained(config.model_copy(update={"moment_rounding": "nearest"}))[1]):
        found = moments_of(other)
        assert all(not torch.equal(found[key], numbers) for key, numbers in moments_of(first).items())


def test_pieces_of_parameters_are_rounded_as_the_parameters_are() -> None:
    """As ZeRO cuts them: a flat tensor holds the end of one, all of the next and the beginning of a third."""
    config = ROUNDED.model_copy(update={"muon_learning_rate": 0.0, "weight_decay": 0.0})
    whole, optimizer = trained(config)
    wanted, initial = moments_of(optimizer), drawn(0)
    sizes = {name: tensor.numel() for name, tensor in initial.items()}
    cuts = {"a.weight": (71, sizes["a.weight"]), "b.weight": (0, sizes["b.weight"]), "c.bias": (0, 30)}
    pieces, offset = [], 5  # and what is before and behind is of no parameter
    for name, (start, stop) in cuts.items():
        pieces.append(Piece(name, TENSORS[name], start, stop, offset))
        offset += stop - start
    flat = nn.Parameter(torch.zeros(offset + 2))
    for piece in pieces:
        piece.of(flat.data).copy_(initial[piece.name].view(-1)[piece.start : piece.stop])
    apart = MuonAdamW([("flat", flat)], config, seed=3)
    apart.param_groups[0]["pieces"] = {flat: tuple(pieces)}
    stepped({"flat": flat}, apart, range(6))
    for piece in pieces:
        own = whole[piece.name].detach().view(-1)[piece.start : piece.stop]
        assert torch.equal(piece.of(flat.detach()), own), piece
    for kind, piece, numbers in apart.moments():
        assert torch.equal(numbers, wanted[kind, piece.name, 0].view(-1)[piece.start : piece.stop]), (kind, piece)


def test_moments_in_float32_are_not_rounded() -> None:
    with pytest.raises(ValueError, match="moment_rounding stochastic with moments float32: nothing is rounded"):
        OptimizerConfig(moment_rounding="stochastic")


def test_the_update_of_muon_has_the_spectral_norm_that_its_scale_says() -> None:
    """About √(rows / columns) of a tall matrix and 1 of a wide one, of each of a stack's by itself (Bernstein 2025)."""
    for shape in ((4, 64, 16), (4, 16, 64)):
        parameter = nn.Parameter(torch.zeros(shape))
        optimizer = MuonAdamW([("w", parameter)], OptimizerConfig(muon_learning_rate=1.0, weight_decay=0.0))
        sizes = torch.tensor([1e-6, 1.0, 1e3, 1.0])[:, None, None]  # an expert's small gradient moves it no less
        parameter.grad = torch.randn(shape, generator=torch.Generator().manual_seed(5)) * sizes
        optimizer.begin_step(1.0)
        optimizer.step()
        norms = torch.linalg.matrix_norm(parameter.detach(), 2) / max(1.0, shape[1] / shape[2]) ** 0.5
        assert norms.min() > 0.6
        assert norms.max() < 1.3  # see above: the quintic's band


MODEL = ModelConfig(q_lora_rank=32, num_nextn_predict_layers=1)
GROUPED = ModelConfig(attention="gqa", num_key_value_heads=2, qkv_bias=True, qk_norm=True)


@pytest.mark.parametrize("config", [MODEL, GROUPED], ids=["mla", "gqa"])
def test_each_parameter_has_its_rule(config: ModelConfig) -> None:
    """Muon takes matrices between hidden states; norms and biases are not decayed, and all matrices are."""
    with torch.device("meta"):
        named = dict(Transformer(config, 64).named_parameters())
    rules = rules_of(named, OptimizerConfig())
    hidden = {
        "q_proj", "q_a_proj", "q_b_proj", "k_proj", "v_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj",
        "gate_up_proj", "down_proj", "eh_proj",
    }  # fmt: skip
    for name, rule in rules.items():
        module = name.removesuffix(".weight").rpartition(".")[2]
        if name.endswith(".bias") or "norm" in module:
            assert rule == ("adam", 0.0), name
        elif module in hidden:
            assert rule == ("muon", 0.1), name
        else:
            assert module in {"embed_tokens", "lm_head", "gate"}, name
            assert rule == ("adam", 0.1), name
    assert set(rules.values()) == {("adam", 0.0), ("adam", 0.1), ("muon", 0.1)}
    alone = rules_of(named, OptimizerConfig(muon_learning_rate=0.0))
    assert alone == {name: ("adam", decay) for name, (_, decay) in rules.items()}


def rules_of(named: dict[str, nn.Parameter], config: OptimizerConfig) -> dict[str, tuple[str, float]]:
    """(kind, weight decay) of each parameter."""
    groups = MuonAdamW(named.items(), config).param_groups
    rules = {p.name: (g["kind"], g["decay"]) for g in groups for pieces in g["pieces"].values() for p in pieces}
    assert set(rules) == set(named)
    return rules


@pytest.mark.parametrize("shape", [(32, 8), (3, 32, 8), (3, 8, 6)])
def test_fused_rows_come_apart_and_together(shape: tuple[int, ...]) -> None:
    stack = torch.arange(float(torch.Size(shape).numel())).view(-1, *shape[-2:])
    for fused in (Fused(1, (shape[-2],)), Fused(1, (3, shape[-2] - 3)), Fused(2, (1, shape[-2] // 2 - 1))):
        parts = fused.apart(stack)
        for part, rows in zip(parts, fused.rows, strict=True):
            assert part.shape == (len(stack), fused.times * rows, shape[-1])
        assert torch.equal(fused.together(parts), stack)


def test_logical_matrices_are_those_of_the_equations() -> None:
    """Each is orthogonalised and scaled by itself; in the model, against the rows that its forward pass takes them for."""
    model = Transformer(MODEL, 64)
    model.initialise(0)
    config = OptimizerConfig(muon_learning_rate=1.0, weight_decay=0.0, muon_matrices="logical")
    named, before = dict(model.named_parameters()), {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = MuonAdamW(named.items(), config, fused_of(config, MODEL))
    for i, parameter in enumerate(named.values()):
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    gradients = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
    optimizer.begin_step(1.0)
    optimizer.step()

    def held(name: str, rows: torch.Tensor) -> None:
        """These rows of each matrix were taken for one."""
        gradient = gradients[name][..., rows, :]
        wanted = -(max(1.0, gradient.shape[-2] / gradient.shape[-1]) ** 0.5) * orthogonalised(gradient)
        moved = (named[name].detach() - before[name])[..., rows, :]
        # A first step's momentum is a multiple of the gradient, which the iteration divides out; float32, sums of 128.
        torch.testing.assert_close(moved, wanted, rtol=1e-3, atol=1e-4, msg=name)

    c = MODEL
    keys_of_head = torch.arange(c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim)).view(
        c.num_attention_heads, -1
    )
    queries_of_head = torch.arange(c.num_attention_heads * c.head_width).view(c.num_attention_heads, -1)
    attention, experts = "layers.1.self_attn", "layers.1.mlp.experts"
    held(f"{attention}.kv_b_proj.weight", keys_of_head[:, : c.qk_nope_head_dim].flatten())
    held(f"{attention}.kv_b_proj.weight", keys_of_head[:, c.qk_nope_head_dim :].flatten())
    held(f"{attention}.q_b_proj.weight", queries_of_head[:, : c.qk_nope_head_dim].flatten())
    held(f"{attention}.q_b_proj.weight", queries_of_head[:, c.qk_nope_head_dim :].flatten())
    held(f"{attention}.kv_a_proj_with_mqa.weight", torch.arange(c.kv_lora_rank))
    held(f"{attention}.kv_a_proj_with_mqa.weight", torch.arange(c.qk_rope_head_dim) + c.kv_lora_rank)
    held(f"{attention}.o_proj.weight", torch.arange(c.hidden_size))
    for hidden, name in (
        (c.moe_intermediate_size, f"{experts}.gate_up_proj"),
        (c.intermediate_size, "layers.0.mlp.gate_up_proj.weight"),
    ):
        held(name, torch.arange(hidden))
        held(name, torch.arange(hidden) + hidden)
    held(f"{experts}.down_proj", torch.arange(c.hidden_size))
