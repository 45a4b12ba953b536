"""The order of the house: a file imports only what stands further down, also inside functions and for types alone.

A new file gets its line here. A line with a star serves several files, which then may not import one another;
a file with a line of its own does not count among them.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

from tests.house.rules import PACKAGES, imported_modules, sources

ORDER = (
    "nnterp/__main__.py",
    "nnterp/command_line.py",
    "nnterp/commands/__init__.py",
    "nnterp/commands/*.py",
    "nnterp/commands/terminal.py",
    "nnterp/contract/__init__.py",
    "nnterp/contract/run.py",
    "nnterp/contract/promises.py",
    "nnterp/contract/subject.py",
    "nnterp/contract/oracle.py",
    "nnterp/__init__.py",
    "nnterp/display.py",
    "nnterp/pictures/__init__.py",
    "nnterp/pictures/*.py",
    "nnterp/pictures/drawing.py",
    "nnterp/lens_table.py",
    "nnterp/interventions/__init__.py",
    "nnterp/interventions/*.py",
    "nnterp/interventions/activation_patching.py",
    "nnterp/interventions/attribution_units.py",
    "nnterp/interventions/sweep.py",
    "nnterp/interventions/batching.py",
    "nnterp/interventions/target_prompts.py",
    "nnterp/interventions/sites.py",
    "nnterp/interventions/metrics.py",
    "nnterp/choices.py",
    "nnterp/prompt_utils.py",
    "nnterp/nnsight_utils.py",
    "nnterp/standardized_transformer.py",
    "nnterp/rename_utils.py",
    "nnterp/naming.py",
    "nnterp/inference/__init__.py",
    "nnterp/inference/infer.py",
    "nnterp/inference/writing.py",
    "nnterp/inference/sizes.py",
    "nnterp/inference/stream.py",
    "nnterp/inference/layers.py",
    "nnterp/inference/layer.py",
    "nnterp/inference/sums.py",
    "nnterp/inference/flow.py",
    "nnterp/inference/skeleton.py",
    "nnterp/inference/scales.py",
    "nnterp/inference/config_keys.py",
    "nnterp/inference/numbers.py",
    "nnterp/inference/stand_in.py",
    "nnterp/inference/probe.py",
    "nnterp/inference/errors.py",
    "nnterp/validation.py",
    "nnterp/rotary.py",
    "nnterp/rotation_flow.py",
    "nnterp/attention_sources.py",
    "nnterp/attention.py",
    "nnterp/attention_operations.py",
    "nnterp/head_contributions.py",
    "nnterp/repeated_heads.py",
    "nnterp/attention_flow.py",
    "nnterp/attention_forms.py",
    "nnterp/attention_kernel.py",
    "nnterp/attention_places.py",
    "nnterp/norms.py",
    "nnterp/experts.py",
    "nnterp/mixer_states.py",
    "nnterp/residual_stream.py",
    "nnterp/vocabulary.py",
    "nnterp/prefix_space.py",
    "nnterp/token_text.py",
    "nnterp/operation_access.py",
    "nnterp/accessors.py",
    "nnterp/additions.py",
    "nnterp/rename.py",
    "nnterp/dimensions.py",
    "nnterp/rename_plan.py",
    "nnterp/architectures.py",
    "nnterp/spec.py",
    "nnterp/spec_layer.py",
    "nnterp/multipliers.py",
    "nnterp/kept_path.py",
    "nnterp/calling.py",
    "nnterp/conditions.py",
    "nnterp/spec_reader.py",
    "nnterp/errors.py",
    "nnterp/files.py",
    "nnterp/frozen.py",
    "nnterp/demo_models/train.py",
    "nnterp/demo_models/card.py",
    "nnterp/demo_models/evaluate.py",
    "nnterp/demo_models/corpus.py",
    "nnterp/demo_models/__init__.py",
    "nnsight_core/__init__.py",
    "nnsight_core/language_model.py",
    "nnsight_core/padding.py",
    "nnsight_core/loading.py",
    "nnsight_core/loading_options.py",
    "nnsight_core/model.py",
    "nnsight_core/scan.py",
    "nnsight_core/tracer.py",
    "nnsight_core/session.py",
    "nnsight_core/invoker.py",
    "nnsight_core/editor.py",
    "nnsight_core/edit_runs.py",
    "nnsight_core/steps.py",
    "nnsight_core/gone.py",
    "nnsight_core/gathering.py",
    "nnsight_core/passes.py",
    "nnsight_core/call.py",
    "nnsight_core/cache.py",
    "nnsight_core/envoy.py",
    "nnsight_core/calls.py",
    "nnsight_core/tree.py",
    "nnsight_core/tree_text.py",
    "nnsight_core/renames.py",
    "nnsight_core/edits.py",
    "nnsight_core/source.py",
    "nnsight_core/batching.py",
    "nnsight_core/prompts.py",
    "nnsight_core/options.py",
    "nnsight_core/keeping.py",
    "nnsight_core/current.py",
    "nnsight_core/gradients.py",
    "nnsight_core/bytecode.py",
    "nnsight_core/tape.py",
    "nnsight_core/live.py",
    "nnsight_core/joining.py",
    "nnsight_core/hooked_calls.py",
    "nnsight_core/interleaver.py",
    "nnsight_core/turns.py",
    "nnsight_core/forward_pass.py",
    "nnsight_core/handed_out.py",
    "nnsight_core/observers.py",
    "nnsight_core/witness.py",
    "nnsight_core/asked.py",
    "nnsight_core/line_tracers.py",
    "nnsight_core/order.py",
    "nnsight_core/thread_state.py",
    "nnsight_core/scope.py",
    "nnsight_core/input_proxy.py",
    "nnsight_core/proxy.py",
    "nnsight_core/appearance.py",
    "nnsight_core/token_index.py",
    "nnsight_core/events.py",
    "nnsight_core/rows.py",
    "nnsight_core/run_axes.py",
    "nnsight_core/batch_axes.py",
    "nnsight_core/fold_order.py",
    "nnsight_core/dry_run.py",
    "nnsight_core/flow.py",
    "nnsight_core/twin.py",
    "nnsight_core/devices.py",
    "nnsight_core/copies.py",
    "nnsight_core/hooks.py",
    "nnsight_core/gates.py",
    "nnsight_core/taps.py",
    "nnsight_core/carried.py",
    "nnsight_core/kinds.py",
    "nnsight_core/operations.py",
    "nnsight_core/kernels.py",
    "nnsight_core/flex.py",
    "nnsight_core/kernel_call.py",
    "nnsight_core/compiled.py",
    "nnsight_core/operators.py",
    "nnsight_core/shapes.py",
    "nnsight_core/input_errors.py",
    "nnsight_core/errors.py",
    "nnsight_core/error_text.py",
    "nnsight_core/old_spellings.py",
    "nnsight_core/arguments.py",
    "nnsight_core/counting.py",
    "nnsight_core/saveable.py",
    "nnsight_core/values.py",
    "nnsight_core/sites.py",
)


def imports_flow_downhill(root: Path, order: tuple[str, ...] = ORDER) -> list[str]:
    """Every import of a house file by a house file goes to a later line of the order."""
    files = dict(sources(root))
    complaints = [
        f"{name}:1: has no place in the order; give it a line in ORDER (tests/house/downhill.py)"
        for name in files
        if _place(name, order) is None
    ]
    for name, tree in files.items():
        here = _place(name, order)
        for line, imported in imported_modules(tree, name):
            target = _house_file(imported, set(files))
            there = None if target is None else _place(target, order)
            if here is None or there is None or target == name:
                continue
            if there == here:
                complaints.append(f"{name}:{line}: imports {target}, which stands on the same line of the order")
            elif there < here:
                complaints.append(f"{name}:{line}: imports {target}, which stands higher in the order")
    return list(dict.fromkeys(complaints))


def _place(name: str, order: tuple[str, ...]) -> int | None:
    if name in order:
        return order.index(name)
    return next((place for place, pattern in enumerate(order) if fnmatchcase(name, pattern)), None)


def _house_file(imported: str, files: set[str]) -> str | None:
    """The file that an import reaches: `nnterp.spec.ArchitectureSpec` is nnterp/spec.py, `nnterp.Thing` its face."""
    parts = imported.split(".")
    if parts[0] not in PACKAGES:
        return None
    for length in range(len(parts), 0, -1):
        stem = "/".join(parts[:length])
        for candidate in (f"{stem}.py", f"{stem}/__init__.py"):
            if candidate in files:
                return candidate
    return f"{parts[0]}/__init__.py"
