//! The role sqlite: a database in memory-backed files, under small transactions.

use std::fmt::Write as _;
use std::ops::Range;

use crate::content::{Content, Values};
use crate::shell::Shell;
use crate::workload::{Damage, Done, Result, Workload, compare};

const PROGRAM: &str = "/usr/bin/sqlite3";
const DATABASE: &str = "/srv/orders.db";
/// Rows that one statement inserts or reads while data is loaded.
const BATCH: usize = 64;
/// Events that are kept; with each transaction one comes and the oldest goes.
const EVENTS_MAX: u64 = 2000;

const SCHEMA: &str = "PRAGMA page_size = 4096;
CREATE TABLE item (id INTEGER PRIMARY KEY, generation INTEGER, payload BLOB);
CREATE TABLE event (id INTEGER PRIMARY KEY, item INTEGER, what TEXT);
CREATE INDEX event_of_item ON event (item);";

pub struct Sqlite {
    shell: Shell,
    content: Content,
    /// How often each row was updated.
    generations: Vec<u32>,
    events: u64,
    statement: String,
    payload: Vec<u8>,
}

impl Sqlite {
    /// Creates a database of so many bytes.
    pub fn start(seed: u64, data_bytes: u64) -> Result<Sqlite> {
        Sqlite::open(PROGRAM, DATABASE, seed, data_bytes)
    }

    fn open(program: &str, database: &str, seed: u64, data_bytes: u64) -> Result<Sqlite> {
        let content = Content {
            seed,
            values: Values::Mixed,
            // Rows are small.
            bytes_min: 256,
        };
        let rows = (data_bytes / content.bytes_mean() as u64).max(1) as usize;
        let mut sqlite = Sqlite {
            shell: Shell::open(program, database)?,
            content,
            generations: vec![0; rows],
            events: 0,
            statement: String::new(),
            payload: Vec::new(),
        };
        sqlite.shell.run(SCHEMA)?;
        sqlite.shell.run("BEGIN;")?;
        for first in (0..rows).step_by(BATCH) {
            sqlite.insert(first..(first + BATCH).min(rows))?;
        }
        sqlite.shell.run("COMMIT;")?;
        Ok(sqlite)
    }

    fn insert(&mut self, items: Range<usize>) -> Result<()> {
        self.statement.clear();
        self.statement.push_str("INSERT INTO item VALUES ");
        for item in items.clone() {
            let comma = if item == items.start { "" } else { "," };
            // Writing to a string cannot fail.
            let _ = write!(self.statement, "{comma}({item},0,X'");
            self.put_payload(item);
            self.statement.push_str("')");
        }
        self.statement.push(';');
        self.shell.run(&self.statement)
    }

    fn put_payload(&mut self, item: usize) {
        let generation = self.generations[item];
        self.content.write(item, generation, &mut self.payload);
        put_hexadecimal(&self.payload, &mut self.statement);
    }
}

impl Workload for Sqlite {
    fn items(&self) -> usize {
        self.generations.len()
    }

    fn request(&mut self, random: u64) -> Result<Done> {
        let item = (random >> 8) as usize % self.items();
        let generation = self.generations[item].wrapping_add(1);
        self.generations[item] = generation;
        let event = self.events;
        self.events += 1;
        self.statement.clear();
        // Writing to a string cannot fail.
        let _ = write!(
            self.statement,
            "BEGIN;\nINSERT INTO event VALUES ({event},{item},'generation {generation}');\n\
             DELETE FROM event WHERE id <= {event} - {EVENTS_MAX};\n\
             UPDATE item SET generation = {generation}, payload = X'"
        );
        self.put_payload(item);
        let _ = write!(self.statement, "' WHERE id = {item};\nCOMMIT;");
        self.shell.run(&self.statement)?;
        Ok(Done::Wrote)
    }

    fn check(&mut self, first: usize, count: usize) -> Result<Vec<Damage>> {
        let end = first + count;
        let rows = self.shell.ask(&format!(
            "SELECT id || ' ' || generation || ' ' || hex(payload) FROM item \
             WHERE id >= {first} AND id < {end} ORDER BY id;"
        ))?;
        let mut damage = Vec::new();
        for item in first..end {
            self.statement.clear();
            let _ = write!(self.statement, "{item} {} ", self.generations[item]);
            self.put_payload(item);
            // A row that is missing, or a complaint in its place, differs too.
            let found = rows.get(item - first).map_or("", String::as_str);
            damage.extend(compare(item, self.statement.as_bytes(), found.as_bytes()));
        }
        Ok(damage)
    }

    fn end_of_pass(&mut self) -> Result<Vec<Damage>> {
        let answer = self.shell.ask("PRAGMA integrity_check;")?;
        if answer == ["ok"] {
            return Ok(Vec::new());
        }
        let said = answer.first().map_or("nothing", String::as_str);
        Ok(vec![Damage {
            item: 0,
            what: format!("integrity_check={said}"),
        }])
    }
}

/// As sqlite's `hex()` writes it.
fn put_hexadecimal(bytes: &[u8], out: &mut String) {
    const DIGITS: &[u8; 16] = b"0123456789ABCDEF";
    for byte in bytes {
        out.push(char::from(DIGITS[usize::from(byte >> 4)]));
        out.push(char::from(DIGITS[usize::from(byte & 15)]));
    }
}
