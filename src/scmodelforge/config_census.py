"""The section `data.census`: which cells of a CELLxGENE Census.

The keys that choose cells are called as the Census calls its obs columns, so that a value can be copied from its web
pages; together they make one filter of the language of TileDB-SOMA.
"""

from __future__ import annotations

import ast

from pydantic import Field, field_validator

from scmodelforge.config_section import Section

LISTS = ("tissue_general", "tissue", "disease", "cell_type", "assay", "dataset_id")
OBS_COLUMNS = ["cell_type", "tissue_general", "disease", "assay", "dataset_id", "donor_id"]


class CensusConfig(Section):
    """Cells of a CELLxGENE Census (CZI Cell Science Program 2025), read over the network or from a copy."""

    organism: str = Field(
        "homo_sapiens", min_length=1, description="As the Census has it: homo_sapiens, mus_musculus, ..."
    )
    version: str = Field(
        "stable",
        min_length=1,
        description="Release of the public Census: a date such as 2025-01-30, which always names the same cells, "
        "stable or latest.",
    )
    uri: str | None = Field(
        None, description="Folder or S3 address of a copy to read instead of the public Census."
    )
    tissue_general: list[str] = Field(
        default_factory=list, description="Only these tissues, coarsely; []: all."
    )
    tissue: list[str] = Field(default_factory=list, description="Only these tissues; []: all.")
    disease: list[str] = Field(
        default_factory=list, description="Only these; 'normal' is no disease; []: all."
    )
    cell_type: list[str] = Field(default_factory=list, description="Only these cell types; []: all.")
    assay: list[str] = Field(default_factory=list, description="Only these assays; []: all.")
    dataset_id: list[str] = Field(default_factory=list, description="Only these data sets; []: all.")
    is_primary_data: bool | None = Field(
        True,
        description="true: each cell once, though several data sets hold it; false: the other copies; null: all.",
    )
    obs_value_filter: str | None = Field(
        None,
        min_length=1,
        description="More conditions, as TileDB-SOMA writes them: \"sex == 'female' and nnz > 500\".",
    )
    obs_columns: list[str] = Field(
        default_factory=lambda: list(OBS_COLUMNS),
        description="obs columns to read: what groups, labels and tokens are made of.",
    )

    @field_validator("organism")
    @classmethod
    def _as_written_there(cls, value: str) -> str:
        return value.strip().lower().replace(" ", "_")

    @field_validator("obs_value_filter")
    @classmethod
    def _expression(cls, value: str | None) -> str | None:
        try:
            if value is not None:
                ast.parse(value, mode="eval")  # the language is a part of Python's
        except (SyntaxError, ValueError) as error:
            raise ValueError(
                f"'{value}' is no condition ({error.args[0]}); write such as \"sex == 'female' and nnz > 500\""
            ) from error
        return value

    @property
    def columns(self) -> tuple[str, ...]:
        """The obs columns that are read: those asked for, and those that choose the cells."""
        listed = (column for column in LISTS if getattr(self, column))
        return tuple(dict.fromkeys([*self.obs_columns, *listed, "dataset_id"]))

    @property
    def value_filter(self) -> str | None:
        """All conditions as one; None if there are none."""
        parts = [f"{column} in {_quoted(getattr(self, column))}" for column in LISTS if getattr(self, column)]
        if self.is_primary_data is not None:
            parts.insert(0, f"is_primary_data == {self.is_primary_data}")
        if self.obs_value_filter is not None:
            parts.append(f"({self.obs_value_filter})" if parts else self.obs_value_filter)
        return " and ".join(parts) or None

    def __str__(self) -> str:
        return f"Census {self.uri or self.version}, {self.organism}"


def _quoted(values: list[str]) -> str:
    return "[" + ", ".join(map(repr, values)) + "]"
