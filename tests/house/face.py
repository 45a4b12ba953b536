"""What importing a package may do: give names, all of them listed, and change nothing else."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

# Runs in a fresh interpreter, where torch and transformers are imported first: what they change is theirs.
_IMPORT_AND_COMPARE = """
import sys, warnings
import greenlet, torch, transformers
from torch.nn.modules import module as torch_module

def state():
    kinds = (torch.Tensor, torch.nn.Module, torch.nn.Parameter, torch.autograd.Function, object)
    found = {f"{kind.__module__}.{kind.__name__}.{name}": id(value)
             for kind in kinds for name, value in vars(kind).items()}
    found |= {f"torch.{name}": id(value) for name, value in vars(torch).items() if callable(value)}
    found |= {name: tuple(value) for name, value in vars(torch_module).items()
              if name.startswith("_global") and isinstance(value, dict)}
    found |= {f"sys.{name}": getattr(sys, name)
              for name in ("excepthook", "unraisablehook", "displayhook", "breakpointhook", "stdout", "stderr")}
    found |= {"sys.meta_path": list(sys.meta_path), "sys.path_hooks": list(sys.path_hooks), "sys.path": list(sys.path)}
    found |= {"sys.gettrace()": sys.gettrace(), "sys.getprofile()": sys.getprofile(), "greenlet": greenlet.gettrace()}
    found |= {"warnings.filters": list(warnings.filters), "grad": torch.is_grad_enabled(),
              "dtype": torch.get_default_dtype(), "device": torch.get_default_device(),
              "seed": torch.initial_seed(), "modes": torch._C._len_torch_function_stack()}
    return found

for name in PREPARE:
    __import__(name)
before = state()
for name in MODULES:
    __import__(name)
after = state()
changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
sys.stdout.write("\\n".join(changed))
"""


def changed_by_importing(*modules: str, path: str) -> list[str]:
    """The names, in the process, of what is no longer as it was once the modules are imported."""
    given = f"import sys; sys.path.insert(0, {path!r}); PREPARE = {_LAZY!r}; MODULES = {modules!r}"
    code = f"{given}\n{_IMPORT_AND_COMPARE}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise AssertionError(f"importing {', '.join(modules)} failed:\n{done.stderr}")
    return done.stdout.splitlines()


# transformers imports these when they are first named, and what that changes is not ours.
_LAZY = ("transformers.modeling_utils", "transformers.generation", "transformers.models.auto.modeling_auto")


def face_complaints(module: ModuleType) -> list[str]:
    """`__all__` is sorted without regard to case, lists every public name, and lists nothing that is not there."""
    if not hasattr(module, "__all__"):
        return [f"{module.__name__} has no __all__"]
    listed = list(module.__all__)
    complaints = []
    if listed != sorted(listed, key=str.casefold):
        complaints.append(f"{module.__name__}.__all__ is not sorted: {sorted(listed, key=str.casefold)}")
    complaints += [f"{module.__name__}.{name} is listed twice" for name in set(listed) if listed.count(name) > 1]
    complaints += [f"{module.__name__}.{name} is listed and missing" for name in listed if not hasattr(module, name)]
    # What `from __future__` binds is offered to nobody.
    ignored = (ModuleType, type(annotations))
    bound = {name for name, value in vars(module).items() if not isinstance(value, ignored)}
    bound = {name for name in bound if not name.startswith("_")}
    complaints += [f"{module.__name__}.{name} is public and not listed" for name in bound.difference(listed)]
    return sorted(complaints)
