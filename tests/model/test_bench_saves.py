"""What bench/convert.py and bench/checkpoints.py work out: a conversion's memory by its model, and what a save costs."""

from __future__ import annotations

import json

import pytest

from gristmill.model.config import ModelConfig
from tests.model.test_bench_growth import bench


def test_a_conversions_memory_is_of_the_largest_matrix_and_the_file_and_not_of_the_model() -> None:
    convert = bench("convert")
    small, deep = convert.shape(2, 16), convert.shape(5, 64, dense=3)
    one, other = (convert.importing(config, 1024, 10**9) for config in (small, deep))
    # The dense block's in bfloat16, twice, and 128 rows of it (or of one as wide) in float32, three times.
    matrices = 2 * 18432 * 7168 * 2 + 128 * 18432 * 4 * 3
    descriptions = (one.own - convert.ON_FIRST_USE - matrices) / convert.TENSOR_BYTES
    # A block has 7 tensors of attention and 2 norms; a dense one 3 matrices; one of experts 3 for each and for the shared
    # one, a gate and its bias; the MTP module is such a block and 4 more; embedding, norm and head.
    assert descriptions == (9 + 3) + 2 * (9 + 3 * 17 + 2) + 4 + 3
    deeper = (other.own - one.own) / convert.TENSOR_BYTES
    assert deeper == 3 * 9 + 2 * 3 + 3 * (3 * 65 + 2) - 2 * (3 * 17 + 2)  # only descriptions grow
    assert (one.mapped, other.mapped) == (10**9, 10**9)
    assert convert.exporting(small, 1024, 5).own == one.own - matrices
    assert convert.Held(3 << 20, 5 << 20).mib(100, 300) == (103, 308)


def test_what_the_model_says_of_the_released_shape() -> None:
    found = bench("convert").of_v3()
    assert found["import_own_model_mib"] < 1024  # of 671 B parameters
    stack = 256 * 4096 * 7168 * 2  # an expert stack of a block is one tensor of ours, and so a file
    assert max(found["import_model_mib"], found["export_model_mib"]) < 24 * 1024  # pages of files included
    assert found["export_model_mib"] - found["export_own_model_mib"] == stack // 2**20


def test_a_conversion_both_ways_stays_within_its_model_of_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the bench measures it, of a release whose widths are small and whose stacks of experts are not.

    The model allows far less than a stack beyond what the libraries take, so that a conversion that held one is seen.
    """
    convert = bench("convert")

    def shape(layers: int, experts: int, dense: int = 1) -> ModelConfig:
        return ModelConfig(
            hidden_size=1024, num_hidden_layers=layers, num_attention_heads=8, kv_lora_rank=128, qk_nope_head_dim=64,
            qk_rope_head_dim=64, v_head_dim=64, first_k_dense_replace=dense, intermediate_size=1024,
            n_routed_experts=experts, moe_intermediate_size=1024, num_nextn_predict_layers=0,
        )  # fmt: skip

    monkeypatch.setattr(convert, "shape", shape)
    monkeypatch.setattr("sys.argv", ["convert.py", "--experts", "64", "--layers", "2", "--vocab", "256"])
    convert.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    stack = 64 * 2 * 1024 * 1024 * 2 // convert.MIB
    for way in ("import", "export"):
        own, allowed = found[f"{way}_own_peak_mib"], found[f"{way}_own_peak_model_mib"]
        assert 0 < own <= allowed < found["start_mib"] + stack // 2
        assert found[f"{way}_peak_mib"] <= found[f"{way}_peak_model_mib"]


def test_a_save_costs_its_copy_and_the_waits_until_the_next() -> None:
    checkpoints = bench("checkpoints")
    rows = []
    for step in range(24):
        row = {"step": step, "seconds": 1.0, "evaluating_seconds": 0.25, "copying_seconds": 0.0, "stalled_seconds": 0.0}
        if (step + 1) % 4 == 0:
            row |= {"copying_seconds": 0.5, "seconds": 1.5}
        if step % 4 == 0 and step > 4:  # published in the step behind
            row |= {"stalled_seconds": 0.03, "seconds": 1.28}  # and a quarter of a second slower beside the writing
        rows.append({**row, "saving_seconds": row["copying_seconds"] + row["stalled_seconds"]})
    found = checkpoints.costs(rows, 4)
    assert found["saves"] == 4
    expected = {"step_seconds": 0.75, "copy_seconds": 0.5, "stall_seconds": 0.03, "slowed_seconds": 0.25}
    expected |= {"stall_share": 0.04, "slowed_share": 0.3333}
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ValueError, match="have none to measure"):
        checkpoints.costs(rows[:9], 4)
