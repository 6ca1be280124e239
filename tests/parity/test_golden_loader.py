"""The loader of the reference numbers: each draw is the stored draw, each rule rejects what it should."""

from __future__ import annotations

import pytest
import torch

from tests.golden import case, names

WITH_WEIGHTS = [(name, model) for name in names() for model in case(name).models]


@pytest.mark.parametrize(("name", "model"), WITH_WEIGHTS)
def test_drawn_weights_have_the_stored_fingerprint(name: str, model: str) -> None:
    assert case(name).weights(model).keys() == case(name).shapes(model).keys()


@pytest.mark.parametrize("name", names())
def test_stored_outputs_meet_their_own_rule(name: str) -> None:
    golden = case(name)
    for output, tensor in golden.outputs.items():
        golden.assert_close(output, tensor)
    assert all(tensor.isfinite().all() for tensor in golden.inputs.values())


def test_float_beyond_its_tolerance_is_rejected() -> None:
    golden = case("A_t2v_wan21_size0")
    near = golden.outputs["out_t999"].clone()
    near[0, 0, 0, 0] += 0.9 * golden.atol("out_t999")
    golden.assert_close("out_t999", near)
    near[0, 0, 0, 0] += 0.9 * golden.atol("out_t999")
    with pytest.raises(AssertionError, match="allowed 2e-05"):
        golden.assert_close("out_t999", near)
    near[0, 0, 0, 0] = torch.nan
    with pytest.raises(AssertionError, match="NaN"):
        golden.assert_close("out_t999", near)
    with pytest.raises(AssertionError, match="stored"):
        golden.assert_close("out_t999", near[:1])


def test_integer_that_differs_is_rejected() -> None:
    golden = case("F_umt5_relative_buckets")
    bucket = golden.outputs["bucket"].clone()
    bucket[0] += 1
    with pytest.raises(AssertionError, match="allowed 0"):
        golden.assert_close("bucket", bucket)
    with pytest.raises(AssertionError, match="float32"):
        golden.assert_close("bucket", golden.outputs["bucket"].float())


def test_frames_may_differ_by_one_level_in_one_value_of_a_hundred() -> None:
    golden = case("I_t2v_wan21_unipc")
    frames = golden.outputs["frames_u8"]
    off_by_one = torch.where(frames < 255, frames + 1, frames - 1)
    few = frames.flatten().clone()
    few[: few.numel() // 200] = off_by_one.flatten()[: few.numel() // 200]
    golden.assert_close("frames_u8", few.reshape(frames.shape))
    with pytest.raises(AssertionError, match="of the values differ"):
        golden.assert_close("frames_u8", off_by_one)
    few[0] = (int(few[0]) + 100) % 256
    with pytest.raises(AssertionError, match="largest difference"):
        golden.assert_close("frames_u8", few.reshape(frames.shape))


def test_unknown_case_lists_those_of_its_group() -> None:
    with pytest.raises(KeyError, match="F_umt5_long"):
        case("F_missing")
