"""The tables of the job store."""

import sqlite3
from pathlib import Path

_VERSION = 1
_PRAGMAS = (
    "PRAGMA auto_vacuum=INCREMENTAL",  # what a deleted job took is given back; only heeded by a new database
    "PRAGMA journal_mode=WAL",
    "PRAGMA synchronous=FULL",  # what was answered survives a loss of power
    "PRAGMA foreign_keys=ON",
)
_TABLES = """
CREATE TABLE files (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    purpose TEXT NOT NULL,
    name TEXT NOT NULL,
    num_bytes INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    sha256 TEXT NOT NULL,
    job TEXT NOT NULL,
    holds_errors INTEGER NOT NULL
);
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    input_file TEXT NOT NULL,
    input_sha256 TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    window_s REAL NOT NULL,
    window TEXT NOT NULL,
    seed TEXT NOT NULL,
    metadata TEXT NOT NULL,
    salt TEXT NOT NULL,
    idempotency_key TEXT NOT NULL,
    status TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    expires_at INTEGER NOT NULL,
    total INTEGER NOT NULL DEFAULT 0,
    completed INTEGER NOT NULL DEFAULT 0,
    failed INTEGER NOT NULL DEFAULT 0,
    prompt_tokens INTEGER NOT NULL DEFAULT 0,
    completion_tokens INTEGER NOT NULL DEFAULT 0,
    scanned_bytes INTEGER NOT NULL DEFAULT 0,
    scanned_lines INTEGER NOT NULL DEFAULT 0,
    problems TEXT NOT NULL DEFAULT '[]',
    started_at INTEGER,
    stopping_at INTEGER,
    ended_at INTEGER,
    output_file TEXT NOT NULL DEFAULT '',
    error_file TEXT NOT NULL DEFAULT ''
);
CREATE UNIQUE INDEX job_keys ON jobs (owner, idempotency_key) WHERE idempotency_key != '';
CREATE TABLE items (
    job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    number INTEGER NOT NULL,
    start INTEGER NOT NULL,
    num_bytes INTEGER NOT NULL,
    custom_id TEXT NOT NULL,
    is_done INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (job, number)
) WITHOUT ROWID;
CREATE UNIQUE INDEX item_names ON items (job, custom_id);
CREATE INDEX items_left ON items (job, number) WHERE is_done = 0;
CREATE TABLE results (
    job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    number INTEGER NOT NULL,
    is_error INTEGER NOT NULL,
    line TEXT NOT NULL,
    UNIQUE (job, number)
);
"""


class StoreError(Exception):
    """The store cannot be opened. The message names the file and says what to do."""


def open_database(path: Path) -> sqlite3.Connection:
    """A connection for one thread at a time; each statement outside a transaction is one. Raises StoreError."""
    try:
        connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        connection.row_factory = sqlite3.Row
        for pragma in _PRAGMAS:
            connection.execute(pragma)
        _create_tables(connection, path)
    except sqlite3.Error as err:
        raise StoreError(f"{path} cannot be opened ({err}); move it away, or give another jobs.path") from err
    return connection


def _create_tables(connection: sqlite3.Connection, path: Path) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version == 0:
        connection.executescript(f"BEGIN; {_TABLES} PRAGMA user_version={_VERSION}; COMMIT;")
    elif version != _VERSION:
        how = "give another jobs.path, or move it away"
        raise StoreError(f"{path} was written by another version of Echelon (format {version}, not {_VERSION}); {how}")
