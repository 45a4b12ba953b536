"""Models that are loaded from a folder or the hub: at once in their form, and with their weights when those are needed.

checkpoint = Checkpoint("gpt2")
checkpoint.module           # all modules, with weights on meta: takes no memory
checkpoint.load()           # the model
"""

from __future__ import annotations

import copy
import pickle
import socket
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
import transformers
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.constants import ENDPOINT
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from nnsight_core import thread_state
from nnsight_core.error_text import nearest
from nnsight_core.input_errors import InputError, MissingWeightsError, ModelClassError, ModelNotFoundError
from nnsight_core.loading_options import check_loading_options
from nnsight_core.tree import Tree

#: Which files to read, and how: of what a model is loaded with, what goes for its tokenizer and config as well.
_WHERE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
#: Attributes that a model has only once it is loaded.
_ONLY_LOADED = frozenset({"hf_device_map", "hf_quantizer"})


class Checkpoint:
    """A model in a folder or on the hub, and how it is to be loaded.

    Args:
        name: the folder, or the name on the hub.
        automodel: the class that loads it, or its name in transformers.
        known: names to suggest when there is no such model.
        options: everything else that its ``from_pretrained`` takes.

    Raises:
        ModelNotFoundError: there is no such model, or it cannot be reached.
        InputError: ``automodel`` loads no models.
        OptionError: an option that nobody takes; said when :attr:`module` is built.
    """

    def __init__(
        self,
        name: str | Path,
        automodel: str | type[Any] = "AutoModelForCausalLM",
        known: Sequence[str] = (),
        **options: Any,
    ) -> None:
        _check_place(name, known, options)
        self.name = name
        self._known = known
        self._options = options
        self._automodel = _loader(automodel)
        #: Whether :attr:`module` has its weights.
        self.is_loaded = False

    @cached_property
    def module(self) -> PreTrainedModel:
        """The model without weights, in evaluation mode; with them where it cannot be built without.

        Raises:
            ModelNotFoundError: what there is holds no model.
            ModelClassError: it holds one of another kind.
        """
        skeleton = self._skeleton()
        self.is_loaded = skeleton is None
        return self.load() if skeleton is None else skeleton

    def _skeleton(self) -> PreTrainedModel | None:
        try:
            config, given, left = self._config()
        except (OSError, ValueError, KeyError) as error:
            raise ModelNotFoundError(str(self.name), _readable(error), self._known) from error
        build = getattr(self._automodel, "from_config", None) or self._automodel._from_config
        try:
            with torch.device("meta"), torch.random.fork_rng(devices=[]):
                model: PreTrainedModel = build(config, **given)
        except ValueError as error:
            if type(config) not in getattr(self._automodel, "_model_mapping", (type(config),)):
                raise ModelClassError(
                    str(self.name), config.model_type, self._automodel.__name__, bool(config.is_encoder_decoder)
                ) from error
            raise ModelNotFoundError(str(self.name), _readable(error), self._known) from error
        except Exception:  # noqa: BLE001 - a checkpoint's own code may need numbers for anything at all
            return None
        check_loading_options(left, model, self._automodel)
        model.eval()
        return model

    def _config(self) -> tuple[PretrainedConfig, dict[str, Any], list[str]]:
        """The config, what else the model is built with, and the names of the options that are not the config's."""
        options = copy.deepcopy({name: each for name, each in self._options.items() if name not in _NOT_TO_BE_COPIED})
        dtype = options.pop("dtype", options.pop("torch_dtype", None))
        options.pop("torch_dtype", None)
        config = options.pop("config", None)
        if config is None:
            config, options = AutoConfig.from_pretrained(self.name, return_unused_kwargs=True, **options)
        if dtype is None and _OLD:
            dtype = torch.get_default_dtype()
        # Without a word, and with "auto", it is the config that says what the weights are.
        given = {} if dtype in (None, "auto") else {"dtype": dtype}
        given |= {name: options[name] for name in ("attn_implementation", "experts_implementation") if name in options}
        if hasattr(self._automodel, "from_config"):
            # The config has used these up, and a class that looks for the model's own takes them as well.
            code = ("trust_remote_code", "code_revision")
            given |= {name: self._options[name] for name in code if name in self._options}
        return config, given, list(options)

    def load(self) -> PreTrainedModel:
        """The model, in evaluation mode.

        Raises:
            ModelNotFoundError: its weights are not there, or cannot be read.
            MissingWeightsError: some of them are not there.
        """
        try:
            model, report = self._automodel.from_pretrained(self.name, output_loading_info=True, **self._options)
        except _OUT_OF_MEMORY:
            raise
        except (
            OSError,
            ValueError,
            KeyError,
            RuntimeError,
            SafetensorError,
            EOFError,
            pickle.UnpicklingError,
        ) as error:
            raise ModelNotFoundError(str(self.name), _readable(error), self._known) from error
        # Quantised weights have names of their own.
        if report["missing_keys"] and getattr(model, "hf_quantizer", None) is None:
            raise MissingWeightsError(str(self.name), sorted(report["missing_keys"]), type(model).__name__)
        return model  # type: ignore[no-any-return]

    def tokenizer(self, **options: Any) -> PreTrainedTokenizerBase | None:
        """The tokenizer that belongs to the model, or None where there is none: token ids can then still be given.

        It pads on the left unless the options say otherwise, so that what it makes can be given to a trace.
        """
        shared = {name: each for name, each in self._options.items() if name in (*_WHERE, "trust_remote_code")}
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.name, **{"padding_side": "left", **shared, **options})
        except (OSError, ValueError, KeyError):
            return None
        except ImportError as error:
            # transformers 4 trips over the names of files that are not there, and then misses a library as well.
            if not isinstance(error.__context__, (AttributeError, TypeError)):
                raise
            return None
        # For a folder without one, transformers may make up a tokenizer that knows special tokens alone.
        return tokenizer if len(tokenizer.get_vocab()) > len(tokenizer.all_special_ids) else None

    def home(self) -> torch.device:
        """The device on which the model will take its inputs, as far as that is known before it is loaded."""
        asked = self._options.get("device_map")
        if isinstance(asked, Mapping):
            asked = next(iter(asked.values()), None)
        if asked in ("auto", "balanced", "balanced_low_0", "sequential"):
            return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
        return torch.device("cpu") if asked in (None, "disk") else torch.device(asked)


class LazyWeights:
    """The weights of a model whose modules are there: loaded once, by whoever needs them first.

    Args:
        checkpoint: where they are.
        tree: the tree of the model's envoys.
        check: called with the model when it is loaded; what it raises, every use of the model raises.
    """

    def __init__(self, checkpoint: Checkpoint, tree: Tree, check: Callable[[], None]) -> None:
        self._checkpoint = checkpoint
        self._tree = tree
        # Weak, for it belongs to the model, which holds these weights.
        self._checks = [weakref.WeakMethod(check)]
        self._lock = threading.RLock()
        self._is_loading = False
        self._is_adopted = False
        # It is loaded as it would have been here and now, whatever is switched on where it is needed first.
        self._state = thread_state.snapshot()
        self._built = dict(tree.root.named_modules(remove_duplicate=False))
        self._config = copy.deepcopy(getattr(tree.root, "config", None))

    def alters(self, name: str, value: Any) -> bool:
        """Whether the attribute ``name`` of a module, which is ``value`` now, may be another one with weights."""
        if value is None:
            return name in _ONLY_LOADED
        return not isinstance(value, (PretrainedConfig, tuple, list))

    def serve(self, check: Callable[[], None]) -> None:
        """Another model shares the weights: ``check`` is for when the first is gone."""
        self._checks.append(weakref.WeakMethod(check))

    def load(self) -> None:
        """Load them, unless that has been done.

        Raises:
            ModelNotFoundError: they are not there, or cannot be read.
            MissingWeightsError: some of them are not there.
        """
        with self._lock:
            if self._is_loading or self._tree.unloaded is not self:
                return
            self._is_loading = True
            try:
                if not self._is_adopted:
                    self._adopt(self._loaded())
                    self._is_adopted = True
                # Any of the models that share the weights will do; those that are gone check nothing.
                check = next((each for reference in self._checks if (each := reference()) is not None), None)
                if check is not None:
                    check()
                self._tree.all_loaded()
            finally:
                self._is_loading = False

    def _loaded(self) -> torch.nn.Module:
        now = thread_state.snapshot()
        guard = thread_state.enter(self._state, now) if now != self._state else None
        try:
            with torch.random.fork_rng(devices=[]):
                return self._checkpoint.load()
        finally:
            if now != self._state:
                thread_state.leave(guard, now)

    def _adopt(self, loaded: torch.nn.Module) -> None:
        skeleton = self._tree.root
        _keep_settings(self._config, getattr(skeleton, "config", None), getattr(loaded, "config", None))
        paths = {module: path for path, module in self._built.items()}
        for path, module in list(skeleton.named_modules(remove_duplicate=False)):
            parent, _, name = path.rpartition(".")
            if module is self._built.get(path) or self._built.get(parent) is not skeleton.get_submodule(parent):
                continue
            # It was put there by the user. What it holds of the skeleton is exchanged as well.
            for owner in list(module.modules()):
                for key, child in list(owner._modules.items()):
                    if child in paths:
                        owner._modules[key] = loaded.get_submodule(paths[child])
            setattr(loaded.get_submodule(parent), name, module)
        self._tree.adopt(loaded)


def _keep_settings(built: Any, current: Any, loaded: Any) -> None:
    """What the user has set in a config since it was built, set in that of the loaded model."""
    if not isinstance(current, PretrainedConfig) or not isinstance(loaded, PretrainedConfig):
        return
    for name, value in vars(current).items():
        before = vars(built).get(name)
        if isinstance(value, PretrainedConfig):
            _keep_settings(before, value, getattr(loaded, name, None))
        elif before != value:
            setattr(loaded, name, value)
    # The user may hold the one, and the modules hold the other: what is set in one is set in both.
    current.__dict__ = loaded.__dict__


_OUT_OF_MEMORY: type[RuntimeError] = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)
#: Before version 5, weights came as the default dtype says, and not as the checkpoint does.
_OLD = int(transformers.__version__.partition(".")[0]) < 5
#: They are used up by the loading, or do not concern the config.
_NOT_TO_BE_COPIED = ("state_dict", "quantization_config", "device_map", "max_memory", "output_loading_info")


def _loader(automodel: str | type[Any]) -> Any:
    if isinstance(automodel, str):
        found = getattr(transformers, automodel, None)
        if found is None:
            near = nearest(automodel, [name for name in dir(transformers) if name.startswith("AutoModel")])
            raise InputError(
                f"transformers has no class {automodel!r} to load a model with."
                + (f" Did you mean {' or '.join(map(repr, near))}?" if near else "")
            )
        automodel = found
    if not hasattr(automodel, "from_pretrained"):
        raise InputError(f"automodel={automodel!r} loads no models: it has no from_pretrained().")
    return automodel


def _readable(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


def refuse_loading_options(options: Mapping[str, Any]) -> None:
    """Raises:
    TypeError: there are options for loading, where the model is loaded already.
    """
    if options:
        names = ", ".join(sorted(options))
        raise TypeError(f"{names}: these say how to load a model, but a loaded one was given. Leave them out.")


def _check_place(name: str | Path, known: Sequence[str], options: Mapping[str, Any]) -> None:
    place = Path(name)
    if place.is_dir():
        folder = place / (options.get("subfolder") or "")
        if not str(name) or (options.get("config") is None and not (folder / "config.json").is_file()):
            why = "this folder has no config.json." if str(name) else "it is empty."
            raise ModelNotFoundError(str(name), why, known)
    elif place.exists():
        raise ModelNotFoundError(str(name), "this is a file, and a model is a folder.", known)
    elif isinstance(name, Path) or _is_path(name):
        why = " (~ is a word of the shell's: Path(...).expanduser() says what it stands for.)"
        raise ModelNotFoundError(str(name), f"there is no such folder.{why if str(name)[0] == '~' else ''}", known)
    else:
        _check_hub(str(name), known)


def _is_path(name: str) -> bool:
    """Whether it can be no name on the hub: those are a word, or two with a slash between them."""
    return name[0] in "./\\~" or name.count("/") > 1 or "\\" in name


def _check_hub(name: str, known: Sequence[str]) -> None:
    """Say at once that the hub is out of reach; asking it for each file would try for half a minute."""
    url = urlsplit(ENDPOINT)
    if constants.HF_HUB_OFFLINE or getproxies() or isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        socket.create_connection((str(url.hostname), url.port or 443), timeout=5).close()
    except OSError:
        reason = f"there is no such folder, it is not in the cache, and {url.hostname} cannot be reached."
        raise ModelNotFoundError(name, reason, known) from None
