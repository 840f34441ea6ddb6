"""The tables of one corpus."""

from __future__ import annotations

import time

from sqlalchemy import JSON, Column, Float, ForeignKey, Index, Integer, LargeBinary, MetaData, String, Table, Text

#: the number of this schema; the first one was written without a number
SCHEMA = 3

schema = MetaData()

#: one row: which embedder made the vectors, which generation is current, and a revision that every change raises
meta = Table(
    "meta", schema,
    Column("id", Integer, primary_key=True),
    Column("revision", Integer, nullable=False),
    Column("generation", Integer, nullable=False),
    Column("manifest", String, nullable=False),  # SHA-256 of the current generation's manifest
    Column("embedder", String, nullable=False),
    Column("digest", String, nullable=False),
    Column("dim", Integer, nullable=False),
)  # fmt: skip

documents = Table(
    "documents", schema,
    Column("id", String, primary_key=True),
    Column("source", String, nullable=False, index=True),
    Column("title", Text, nullable=False),
    Column("hash", String, nullable=False),
    Column("at", Float, nullable=False, default=time.time),
    Column("path", String, nullable=False, server_default=""),  # the file it was read from, below the folder
    Column("bytes", Integer, nullable=False, server_default="0"),
    Column("attributes", JSON, nullable=False, server_default="{}"),
    Column("owner", String, nullable=False, server_default=""),
    Column("groups", JSON, nullable=False, server_default="[]"),
)  # fmt: skip

passages = Table(
    "passages", schema,
    Column("row", Integer, primary_key=True, autoincrement=True),
    Column("hash", String, nullable=False, unique=True),
    Column("text", Text, nullable=False),
    Column("vector", LargeBinary, nullable=False),
    sqlite_autoincrement=True,  # a row number is never given twice: a stale cache cannot point at another text
)  # fmt: skip

names = Table(
    "names", schema,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("id", String, nullable=False),
    Column("document", String, ForeignKey("documents.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("passage", Integer, ForeignKey("passages.row"), nullable=False),
    Column("title", Text, nullable=False),
    Column("start", Integer, nullable=False),
    Column("end", Integer, nullable=False),
    Index("names_by_passage", "passage", "seq"),
)  # fmt: skip

#: passages that are found by their words already and whose vector is still to be made: it is empty until then
waiting = Table(
    "waiting", schema,
    Column("passage", Integer, ForeignKey("passages.row", ondelete="CASCADE"), primary_key=True, autoincrement=False),
)  # fmt: skip
