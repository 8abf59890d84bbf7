"""What a config may name: tokenizers, architectures, tasks, benchmarks, and where each one lives.

A name maps to "module:attribute" and is imported when it is used, so reading a config loads no torch.
To add one here, write the class and add its line. An installed package adds names by entry points of the groups below
(docs/plugins.md): the names are known without importing it, and no name can be there twice.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
from dataclasses import dataclass
from typing import Any

from scmodelforge.errors import PluginError

# What the code of a plugin may raise while it is imported.
_BROKEN = (
    *(ImportError, AttributeError, NameError, SyntaxError, TypeError, ValueError, LookupError, OSError),
    *(RuntimeError, AssertionError, ArithmeticError),
)


@dataclass(frozen=True)
class Plugin:
    """A name that an installed package brings, and where its code is ("module:attribute")."""

    name: str
    target: str
    package: str
    version: str

    def __str__(self) -> str:
        return f"{self.package} {self.version}"


@functools.cache
def plugins_in(group: str) -> dict[str, tuple[Plugin, ...]]:
    """What installed packages bring in a group of entry points, by name; nothing is imported."""
    found: dict[str, tuple[Plugin, ...]] = {}
    for point in sorted(importlib.metadata.entry_points(group=group)):
        package, version = (point.dist.name, point.dist.version) if point.dist else ("unknown package", "")
        found[point.name] = (*found.get(point.name, ()), Plugin(point.name, point.value, package, version))
    return found


@dataclass(frozen=True)
class Registry:
    """Names of one kind of thing, and the import path of each; `group`: of the entry points that add to them."""

    kind: str
    entries: dict[str, str]
    group: str

    @property
    def names(self) -> list[str]:
        """All names, those of plugins too, in alphabetical order."""
        return sorted({*self.entries, *plugins_in(self.group)})

    def check(self, name: str) -> str:
        """Return `name` if it is known; raise `ValueError` naming what there is otherwise, or who else has the name."""
        plugins = plugins_in(self.group).get(name, ())
        if len(plugins) + (name in self.entries) > 1:
            owners = ["scmodelforge"] * (name in self.entries) + [f"'{plugin.package}'" for plugin in plugins]
            others = " or ".join(plugin.package for plugin in plugins)
            raise ValueError(
                f"the {self.kind} '{name}' is there more than once: {' and '.join(owners)} bring it (entry points "
                f"'{self.group}'). Uninstall {others}, or ask its authors for another name."
            )
        if plugins or name in self.entries:
            return name
        near = difflib.get_close_matches(name, self.names, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise ValueError(
            f"the {self.kind} '{name}' does not exist in this version.{hint} Available: {', '.join(self.names)}"
        )

    def plugin(self, name: str) -> Plugin | None:
        """The plugin that brings `name`; None for what is built in."""
        return None if name in self.entries else plugins_in(self.group)[self.check(name)][0]

    def load(self, name: str) -> Any:
        """Import and return what `name` stands for.

        Raises
        ------
        PluginError
            If it is a plugin's, and cannot be imported.
        """
        plugin = self.plugin(self.check(name))
        if plugin is None:
            return _attribute(self.entries[name])
        try:
            return _attribute(plugin.target)
        except _BROKEN as error:
            raise PluginError(
                f"The {self.kind} '{name}' of the package {plugin} cannot be imported (entry point '{name} = "
                f"{plugin.target}' of the group '{self.group}'): {type(error).__name__}: {error}\n"
                "Install what it needs, or another version of it; or uninstall it."
            ) from error

    def like(self, name: str) -> str:
        """The built-in that `name` stands in for, as its plugin says in `like`; a built-in is itself."""
        plugin = self.plugin(name)
        if plugin is None:
            return name
        like = getattr(self.load(name), "like", None)
        if like not in self.entries:
            raise PluginError(
                f"The {self.kind} '{name}' of the package {plugin} does not say what it is like: its attribute 'like' "
                f"is {like!r}, and must be one of {', '.join(sorted(self.entries))}. Tell its authors."
            )
        return like


def _attribute(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


TOKENIZERS = Registry(
    "tokenizer strategy",
    {
        "rank_value": "scmodelforge.tokenizers.rank_value:RankValueTokenizer",
        "binned_expression": "scmodelforge.tokenizers.binned_expression:BinnedExpressionTokenizer",
        "continuous_projection": "scmodelforge.tokenizers.continuous_projection:ContinuousTokenizer",
    },
    "scmodelforge.tokenizers",
)
ARCHITECTURES = Registry(
    "model architecture",
    {
        "transformer_encoder": "scmodelforge.models.encoder:TransformerEncoder",
        "autoregressive_transformer": "scmodelforge.models.autoregressive:autoregressive_transformer",
        "masked_autoencoder": "scmodelforge.models.masked_autoencoder:MaskedAutoencoder",
    },
    "scmodelforge.architectures",
)
TASKS = Registry(
    "pretraining task",
    dict.fromkeys(
        ("masked_gene_prediction", "expression_reconstruction", "dual_prediction", "next_gene"),
        "scmodelforge.models.objectives:build_objective",
    ),
    "scmodelforge.tasks",
)
BENCHMARKS = Registry(
    "benchmark",
    {
        "linear_probe": "scmodelforge.evaluation.linear_probe:BENCHMARK",
        "embedding_quality": "scmodelforge.evaluation.embedding_quality:BENCHMARK",
        "knn_annotation": "scmodelforge.evaluation.knn_annotation:BENCHMARK",
        "perturbation": "scmodelforge.evaluation.perturbation:perturbation",
        "masked_prediction": "scmodelforge.evaluation.masked_prediction:masked_prediction",
        "gene_embedding": "scmodelforge.evaluation.gene_embedding:gene_embedding",
    },
    "scmodelforge.benchmarks",
)
