"""Collectives read from HLO text: kinds, how often loops run them, and the bytes they send."""

from __future__ import annotations

import pytest

from vita_jax.planning.collectives import array_bytes, by_kind, collectives

HLO = """\
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%inner_body (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %p = (s32[], bf16[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %w = bf16[8,4]{1,0} get-tuple-element(%p), index=1
  %moved = bf16[8,4]{1,0} collective-permute(%w), channel_id=3, source_target_pairs={{0,1},{1,0}}
  ROOT %t = (s32[], bf16[8,4]{1,0}) tuple(%i, %moved)
}

%inner_condition (p.1: (s32[], bf16[8,4])) -> pred[] {
  %p.1 = (s32[], bf16[8,4]{1,0}) parameter(0)
  ROOT %lt = pred[] constant(true)
}

%body (p.2: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %p.2 = (s32[], bf16[8,4]{1,0}) parameter(0)
  %shard = bf16[8,4]{1,0} get-tuple-element(%p.2), index=1
  %start = (bf16[8,4]{1,0}, bf16[32,4]{1,0}) all-gather-start(%shard), channel_id=1, replica_groups=[2,4]<=[8], \
dimensions={0}, metadata={op_name="jit(step)/layers/gather"}
  %whole = bf16[32,4]{1,0} all-gather-done(%start)
  ROOT %loop = (s32[], bf16[8,4]{1,0}) while(%p.2), condition=%inner_condition, body=%inner_body, \
backend_config={"known_trip_count":{"n":"3"}}
}

%condition (p.3: (s32[], bf16[8,4])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(28)
  %p.3 = (s32[], bf16[8,4]{1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.3), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%i.1, %constant.1), direction=LT
}

ENTRY %main (a: f32[16], b: (s32[], bf16[8,4])) -> f32[16] {
  %a = f32[16]{0} parameter(0)
  %b = (s32[], bf16[8,4]{1,0}) parameter(1)
  %layers = (s32[], bf16[8,4]{1,0}) while(%b), condition=%condition, body=%body
  %scattered = f32[4]{0} reduce-scatter(%a), channel_id=4, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %all = f32[16]{0} all-reduce(%a), channel_id=2, replica_groups=mesh['data'=4,'fsdp'=2] {'data','fsdp'}, \
to_apply=%add
}
"""


def test_every_instruction_counts_as_often_as_its_loops_turn():
    found = {one.kind: one for one in collectives(HLO, num_devices=8)}
    assert {kind: one.times for kind, one in found.items()} == {
        "all-gather": 28,
        "collective-permute": 28 * 3,
        "reduce-scatter": 1,
        "all-reduce": 1,
    }
    assert {kind: one.group for kind, one in found.items() if kind != "collective-permute"} == {
        "all-gather": 4,
        "reduce-scatter": 4,
        "all-reduce": 8,
    }
    assert found["all-gather"].source == "jit(step)/layers/gather"


def test_bytes_are_what_one_device_sends():
    sent = {one.kind: one.bytes_sent for one in collectives(HLO, num_devices=8)}
    assert sent["all-gather"] == 3 * 8 * 4 * 2  # its shard to three others
    assert sent["reduce-scatter"] == pytest.approx(16 * 4 * 3 / 4)
    assert sent["all-reduce"] == pytest.approx(2 * 16 * 4 * 7 / 8)
    assert sent["collective-permute"] == 8 * 4 * 2


def test_a_ragged_exchange_sends_what_it_has_or_what_there_is_room_for():
    operands = "%rows, %room, %at, %sizes, %to, %wanted), channel_id=5, replica_groups={{0,1,2,3}}"
    lines = ["ENTRY %main (rows: bf16[8,4]) -> bf16[24,4] {", "  %rows = bf16[8,4]{1,0} parameter(0)"]
    lines += ["  %room = bf16[24,4]{1,0} broadcast(%zero)", "  %at = s32[4]{0} parameter(1)"]
    lines += [f"  ROOT %got = bf16[24,4]{{1,0}} ragged-all-to-all({operands}", "}"]
    (found,) = collectives("\n".join(lines), num_devices=4)
    assert (found.kind, found.group, found.bytes_sent) == ("ragged-all-to-all", 4, 8 * 4 * 2 * 3 / 4)


def test_kernels_that_take_several_lines_do_not_end_a_computation():
    lines = ["ENTRY %main (a: f32[16]) -> f32[16] {", "  %a = f32[16]{0} parameter(0)"]
    lines += ['  %b = f32[16]{0} custom-call(%a), kernel_metadata={"options":{', '}}, metadata={op_name="kernel"}']
    lines += ["  ROOT %c = f32[16]{0} all-reduce(%b), replica_groups={{0,1}}", "}"]
    assert [one.kind for one in collectives("\n".join(lines), num_devices=2)] == ["all-reduce"]


def test_kinds_are_summed_largest_first():
    totals = by_kind(collectives(HLO, num_devices=8))
    assert list(totals)[-1] == "reduce-scatter"
    assert totals["all-gather"] == (28, 28 * 192.0)


def test_sizes_of_types():
    assert array_bytes("(bf16[8,128]{1,0:T(8,128)(2,1)}, f32[], pred[3])") == 8 * 128 * 2 + 4 + 3
    assert array_bytes("token[]") == 0
