"""What plugins add to a config: keys of their own (`params`), combinations that they refuse, and who they are.

A plugin is a class with some attributes beside what its kind needs (docs/plugins.md):

- `like`: the built-in that it stands in for (tokenizers, architectures, tasks). What fits that one fits the plugin, and
  the model builds beside it what it would build beside that one.
- `Params`, a `Section`: its own keys, if it has any.
- `ignores`, dotted keys of the config that `like` reads and the plugin does not, so that nobody sets them in vain.
- `misfit(config)`: why it does not work with this config, "" if it does; if there is anything that `like` does not say.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from scmodelforge.config_section import Section
from scmodelforge.errors import PluginError
from scmodelforge.registry import ARCHITECTURES, TASKS, TOKENIZERS, Plugin, Registry

if TYPE_CHECKING:
    from scmodelforge.config import Config

KINDS = {
    "tokenizer.strategy": TOKENIZERS,
    "model.architecture": ARCHITECTURES,
    "model.pretraining_task": TASKS,
}


def plugin_params(registry: Registry, name: str | None, value: Any) -> Section | None:
    """The params of a plugin with its defaults filled in; None for what has none.

    Parameters
    ----------
    registry, name
        Who they are for; None: a name that is wrong anyway.
    value
        What the config says.

    Raises
    ------
    ValueError
        If there are params that nobody reads, or (a `ValidationError`) they are wrong.
    """
    plugin = None if name is None else registry.plugin(name)  # what is built in has none, and is not imported
    kind = None if plugin is None else getattr(registry.load(plugin.name), "Params", None)
    if kind is not None:
        unknown = sorted(value.keys() - kind.model_fields.keys()) if isinstance(value, dict) else []
        if unknown:
            raise ValueError(
                f"{name} has no {', '.join(map(str, unknown))}; it has {', '.join(kind.model_fields)}"
            )
        required = [key for key, info in kind.model_fields.items() if info.is_required()]
        if value is None and required:
            raise ValueError(f"{name} needs {', '.join(required)}")
        return kind.model_validate(value)
    if name is not None and value not in (None, {}):
        raise ValueError(f"{name} has no params of its own; leave them out")
    return None


def plugins_of(config: Config) -> dict[str, Plugin]:
    """The plugins that a model of this config needs, by the key that names them."""
    names = (config.tokenizer.strategy, config.model.architecture, config.model.pretraining_task)
    found = {key: KINDS[key].plugin(name) for key, name in zip(KINDS, names, strict=True)}
    return {key: plugin for key, plugin in found.items() if plugin is not None}


def plugin_misfit(config: Config) -> str:
    """The first thing that a plugin says against a config; "" if nothing."""
    for key, plugin in plugins_of(config).items():
        judge = getattr(KINDS[key].load(plugin.name), "misfit", None)
        if judge is not None and (problem := judge(config)):
            return f"{key} {plugin.name} (of {plugin}): {problem}"
    return ""


def plugin_idle(config: Config) -> Iterator[tuple[str, str]]:
    """The keys that a plugin says it ignores, and why they have no effect."""
    for key, plugin in plugins_of(config).items():
        for ignored in getattr(KINDS[key].load(plugin.name), "ignores", ()):
            yield ignored, f"{key} {plugin.name} does not read it"


def plugin_notes(config: Config) -> list[str]:
    """One sentence for each plugin: whose it is, and what it stands in for."""
    return [
        f"{key} {plugin.name} is a plugin ({plugin}), in the place of {KINDS[key].like(plugin.name)}."
        for key, plugin in plugins_of(config).items()
    ]


def plugin_records(config: Config) -> list[dict[str, str]]:
    """What a model says about the plugins that it needs, as plain types."""
    return [
        {"key": key, "name": plugin.name, "package": plugin.package, "version": plugin.version}
        for key, plugin in plugins_of(config).items()
    ]


def _word(text: str) -> str:
    """A name or version, which goes into a message with a command; anything else in its place is refused."""
    if not re.fullmatch(r"[\w.+!-]+", text):
        raise ValueError(text)
    return text


def require_plugins(records: list[dict[str, str]], where: str) -> list[str]:
    """Make sure that the plugins of a model are installed; return a sentence for each of another version.

    Parameters
    ----------
    records
        What `plugin_records` gave when the model was written.
    where
        The model, for messages.

    Raises
    ------
    PluginError
        Saying what to install. Nothing is installed or run from a model.
    """
    changed = []
    for record in records:
        try:
            registry = KINDS[record["key"]]
            name, package, version = (_word(record[field]) for field in ("name", "package", "version"))
        except (LookupError, TypeError, ValueError) as error:
            raise PluginError(f"What '{where}' says about its plugins cannot be read: {record!r}") from error
        if name not in registry.names:
            raise PluginError(
                f"The model '{where}' needs the {registry.kind} '{name}' of the package '{package}' (version "
                f"{version}), which is not installed.\n"
                f"If you trust that package, install it (pip install {package}=={version}, or from where its authors "
                "keep it) and try again."
            )
        plugin = registry.plugin(name)
        if plugin is None or (plugin.package, plugin.version) != (package, version):
            changed.append(
                f"The {registry.kind} '{name}' of '{where}' was that of {package} {version}; now it is that of "
                f"{plugin or 'scmodelforge itself'}."
            )
    return changed
