"""What is read out of the text of a compiled program, counted by hand."""

import re

import pytest

from nope_jax.compile.collectives import Collective, collectives

ADD = "%add (x: f32[], y: f32[]) -> f32[] {\n  ROOT %sum = f32[] add(%x, %y)\n}"
LOOP = """
%condition (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]{0}) parameter(0)
  %end = s32[]{:T(128)} constant(7)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%i, %end), direction=LT
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %all-reduce.1 = f32[8]{0} all-reduce(%x), channel_id=1, replica_groups=[4,2]<=[8], to_apply=%add
}
"""


def program(*lines: str, before: str = "") -> str:
    body = "\n".join(f"  {line}" for line in lines)
    header = "HloModule jit_step, is_scheduled=true, replica_count=1, num_partitions=8"
    return f"{header}\n\n{ADD}\n{before}\nENTRY %main (p: f32[8]) -> f32[8] {{\n{body}\n}}\n"


def only(text: str) -> Collective:
    (collective,) = collectives(text)
    return collective


@pytest.mark.parametrize(
    ("operation", "size", "sent"),
    [
        # Of a ring of 4 each device sends, for an array of 64 bytes on each, 3 quarters of it in every pass.
        ("f32[16]{0} all-gather(%p)", 64, 48),
        ("f32[4,4]{1,0:T(8,128)S(1)} all-reduce(%p), to_apply=%add", 64, 96),
        ("f32[4]{0} reduce-scatter(%p), to_apply=%add", 16, 48),
        ("bf16[32]{0} all-to-all(%p), dimensions={0}", 64, 48),
        ("(f32[8]{0}, /*index=1*/f32[8]{0}) all-to-all(%p, %p)", 64, 48),
        ("(pred[]{:T(128)}, s4[3]{0}) all-reduce(%p, %p), to_apply=%add", 3, 4),
        # What begins on its own gives back what it was given, too.
        ("(f32[4]{0}, f32[16]{0}) all-gather-start(%p)", 64, 48),
        ("((f32[1]{0}, bf16[4]{0}), (f32[4]{0}, bf16[16]{0})) all-gather-start(%p, %q)", 48, 36),
        ("f32[16]{0} all-reduce-start(%p), to_apply=%add", 64, 96),
    ],
)
def test_bytes_by_kind(operation, size, sent):
    found = only(program(f"%x = {operation}, channel_id=3, replica_groups=[2,4]<=[8]"))
    assert found.kind == re.search(r"(\S+?)(-start)?\(%p", operation)[1]
    assert (found.bytes, found.sent, found.group_size, found.times, found.loops) == (size, sent, 4, 1, 0)


def test_a_permute_sends_what_it_gives_and_only_to_others():
    pairs = "source_target_pairs={{0,1},{1,0},{2,2}}"
    line = f"%x = (f32[16]{{0}}, f32[16]{{0}}, u32[], u32[]) collective-permute-start(%p), channel_id=3, {pairs}"
    found = only(program(line, "%done = f32[16]{0} collective-permute-done(%x)"))
    assert (found.kind, found.bytes, found.sent, found.groups) == ("collective-permute", 64, 64, ((0, 1), (1, 0)))
    assert collectives(program("%x = f32[16]{0} collective-permute(%p), source_target_pairs={{0,0},{1,1}}")) == []


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("{{0,2},{1,3},{4,6},{5,7}}", [(0, 2), (1, 3), (4, 6), (5, 7)]),
        ("{}", [tuple(range(8))]),
        ("[2,4]<=[8]", [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ("[4,2]<=[2,4]T(1,0)", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("mesh['data'=2,'fsdp'=2,'tensor'=2] {'fsdp'}", [(0, 2), (1, 3), (4, 6), (5, 7)]),
        ("mesh['a'=2,'b'=4], device_ids=([2,2,2]T(1,0,2)) {'a'}", [(0, 2), (1, 3), (4, 6), (5, 7)]),
        ("mesh['a'=4,'b'=2], device_ids=(0,2,1,3,4,6,5,7) {'b'}", [(0, 2), (1, 3), (4, 6), (5, 7)]),
    ],
)
def test_groups_however_they_are_written(written, groups):
    found = only(program(f"%x = f32[16]{{0}} all-gather(%p), channel_id=1, replica_groups={written}, dimensions={{0}}"))
    assert sorted(found.groups) == groups
    if found.group_size == 2:
        axis = ("data",) if (0, 4) in groups else ("fsdp",)
        assert found.mesh_axes({"data": 2, "fsdp": 2, "tensor": 2}) == axis


@pytest.mark.parametrize(
    ("kind", "chips", "groups", "sent"),
    [
        ("ALL_REDUCE", "0:7", [(chip, chip + 8) for chip in range(8)], 64),
        ("ALL_GATHER", "0:1,5", [(0, 8), (1, 9), (5, 13)], 32),
    ],
)
def test_what_crosses_between_tpu_slices_is_a_collective_of_each_chip_with_its_likes(kind, chips, groups, sent):
    transfer = f'_xla_megascale_target="{{1,2}}x{{{chips}}}",_xla_megascale_transfer_type="{kind}"'
    lines = [
        f"%send = (f32[16]{{0:T(8)}}, u32[]{{:S(2)}}, token[]) send(%p, %t), frontend_attributes={{{transfer}}}",
        f"%recv = (f32[16]{{0:T(8)}}, u32[]{{:S(2)}}, token[]) recv(%t), frontend_attributes={{{transfer}}}",
        "%done = (f32[16]{0:T(8)}, token[]) recv-done(%recv), channel_id=1",
    ]
    found = only(program(*lines))
    assert (found.kind, found.bytes, found.sent) == (kind.lower().replace("_", "-"), 64, sent)
    assert sorted(found.groups) == groups
    assert found.mesh_axes({"data": 2, "fsdp": 8}) == ("data",)


def test_groups_that_are_not_known_are_refused():
    with pytest.raises(ValueError, match="unknown way of naming devices: .*'a':"):
        collectives(program("%x = f32[8]{0} all-reduce(%p), replica_groups=mesh['a'=8] {'a':(2)2}"))


def test_a_group_of_one_exchanges_nothing():
    assert collectives(program("%x = f32[8]{0} all-reduce(%p), replica_groups=[8,1]<=[8]")) == []


def test_a_loop_may_count_up_to_a_number_in_a_fusion():
    """As the GPU compiler writes the rest of a loop over microbatches, of which it does the first apart."""
    fused = """
%compared (q: s32[]) -> pred[] {
  %q = s32[] parameter(0)
  %last = s32[] constant(4)
  ROOT %below = pred[] compare(%q, %last), direction=LT
}
"""
    lines = LOOP.split("\n")
    lines[5] = "  ROOT %less = pred[] fusion(%i), kind=kLoop, calls=%compared"
    start = ["%first = s32[] constant(1)", "%start = (s32[], f32[8]{0}) tuple(%first, %p)"]
    loop = "%loop = (s32[], f32[8]{0}) while(%start), condition=%condition, body=%body"
    assert only(program(*start, loop, before=fused + "\n".join(lines))).times == 3


@pytest.mark.parametrize(
    ("first", "configuration", "turns"),
    [
        ("s32[] parameter(0)", ', backend_config={"known_trip_count":{"n":"3"}}', 3),
        ("s32[] constant(2)", "", 5),  # from 2 up to 7
        ("s32[] parameter(0)", "", None),
    ],
)
def test_what_a_loop_holds_runs_once_a_turn(first, configuration, turns):
    loop = f"%loop = (s32[], f32[8]{{0}}) while(%start), condition=%condition, body=%body{configuration}"
    start = [f"%first = {first}", "%copy = s32[] copy(%first)", "%start = (s32[], f32[8]{0}) tuple(%copy, %p)"]
    found = only(program(*start, loop, before=LOOP))
    assert (found.times, found.loops) == (turns, 1)
    outer = LOOP.replace("%body", "%outer").replace("%condition", "%outer_condition")
    outer = re.sub(r"  %all-reduce.1.*", "\n".join(f"  {line}" for line in [*start, loop]), outer)
    twice = '%twice = (s32[]) while(%p), condition=%outer_condition, body=%outer, x={"known_trip_count":{"n":"2"}}'
    found = only(program(twice, before=LOOP + outer))
    assert (found.times, found.loops) == (turns and 2 * turns, 2)


def test_what_a_tpu_runs_in_pieces_counts_once():
    piece = 'all-gather(%p), channel_id=9, replica_groups=[4,2]<=[8], frontend_attributes={chain_id="0"}'
    pieces = "\n".join(f"%piece.{i} (p: f32[4]) -> f32[8] {{\n  %x.{i} = f32[8]{{0}} {piece}\n}}" for i in range(3))
    calls = [f"%fusion.{i} = f32[8]{{0}} fusion(%p), kind=kOutput, calls=%piece.{i}" for i in range(3)]
    assert only(program(*calls, before=pieces)).times == 1
    apart = pieces.replace('chain_id="0"', "")
    assert len(collectives(program(*calls, before=apart))) == 3


def test_what_a_tpu_reduces_and_slices_at_once_is_a_reduce_scatter():
    inside = "%sum = f32[16]{0} all-reduce(%p), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add"
    scatter = f"%all-reduce-scatter.2 (p: f32[16]) -> f32[4] {{\n  {inside}\n}}"
    found = only(program("%x = f32[4]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.2", before=scatter))
    assert (found.kind, found.shapes, found.sent) == ("reduce-scatter", ("f32[4]",), 48)


def test_what_is_not_a_compiled_program_is_refused():
    with pytest.raises(ValueError, match="text must be that of a compiled program"):
        collectives("module @jit_step attributes {mhlo.num_partitions = 8 : i32}")
