//! The role redis: a server full of values, under GET and SET.

use std::io::{BufReader, Write};
use std::net::TcpStream;

use crate::content::{Content, Values};
use crate::resp::{Reply, read_reply, write_command};
use crate::server::Server;
use crate::workload::{Damage, Done, Result, Workload, compare};

const PORT: u16 = 6379;
/// How many commands are under way at once while data is loaded or checked.
const PIPELINE: usize = 64;
/// Every so-manieth request writes.
const WRITES_ONE_IN: u64 = 4;

pub struct Redis {
    server: Server,
    content: Content,
    connection: Connection,
    /// How often each value was written after the first time.
    generations: Vec<u32>,
    damage: Vec<Damage>,
    expected: Vec<u8>,
    found: Vec<u8>,
}

struct Connection {
    stream: TcpStream,
    input: BufReader<TcpStream>,
    /// Commands that were written but not sent.
    out: Vec<u8>,
}

impl Redis {
    /// Starts the server and gives it so many bytes of values.
    pub fn start(seed: u64, values: Values, data_bytes: u64) -> Result<Redis> {
        let content = Content {
            seed,
            values,
            bytes_min: match values {
                Values::Mixed => 2048,
                Values::Benchmark => 1024,
            },
        };
        let port = PORT.to_string();
        let mut server = Server::start(
            "redis",
            "/usr/bin/redis-server",
            // Nothing to save to: the root is memory.
            &["--port", &port, "--bind", "127.0.0.1", "--save", ""],
        )?;
        let stream = server.connect(PORT)?;
        let input = stream
            .try_clone()
            .map_err(|error| format!("cannot share a connection: {error}"))?;
        let values = (data_bytes / content.bytes_mean() as u64).max(1) as usize;
        let mut redis = Redis {
            server,
            content,
            connection: Connection {
                stream,
                input: BufReader::with_capacity(64 << 10, input),
                out: Vec::new(),
            },
            generations: vec![0; values],
            damage: Vec::new(),
            expected: Vec::new(),
            found: Vec::new(),
        };
        redis.load()?;
        Ok(redis)
    }

    fn load(&mut self) -> Result<()> {
        for first in (0..self.items()).step_by(PIPELINE) {
            let last = (first + PIPELINE).min(self.items());
            for item in first..last {
                self.put_set(item)?;
            }
            self.connection.send()?;
            for item in first..last {
                self.take_set(item)?;
            }
        }
        Ok(())
    }

    fn put_set(&mut self, item: usize) -> Result<()> {
        let generation = self.generations[item];
        self.content.write(item, generation, &mut self.expected);
        self.connection
            .put(&[b"SET", key(item).as_bytes(), &self.expected])
    }

    fn take_set(&mut self, item: usize) -> Result<()> {
        match self.connection.take(&mut self.found)? {
            Reply::Status => Ok(()),
            other => Err(format!("redis answers SET of {} with {other:?}", key(item))),
        }
    }

    fn put_get(&mut self, item: usize) -> Result<()> {
        self.connection.put(&[b"GET", key(item).as_bytes()])
    }

    /// Reads the answer to GET and compares it.
    fn take_get(&mut self, item: usize) -> Result<Option<Damage>> {
        match self.connection.take(&mut self.found)? {
            Reply::Value => {
                let generation = self.generations[item];
                self.content.write(item, generation, &mut self.expected);
                Ok(compare(item, &self.expected, &self.found))
            }
            Reply::Nil => Ok(Some(Damage {
                item,
                what: "missing".to_owned(),
            })),
            Reply::Status => Err(format!("redis answers GET of {} with a status", key(item))),
        }
    }
}

impl Workload for Redis {
    fn items(&self) -> usize {
        self.generations.len()
    }

    fn request(&mut self, random: u64) -> Result<Done> {
        self.server.watch()?;
        let item = (random >> 8) as usize % self.items();
        if random.is_multiple_of(WRITES_ONE_IN) {
            self.generations[item] = self.generations[item].wrapping_add(1);
            self.put_set(item)?;
            self.connection.send()?;
            self.take_set(item)?;
            Ok(Done::Wrote)
        } else {
            self.put_get(item)?;
            self.connection.send()?;
            let damage = self.take_get(item)?;
            self.damage.extend(damage);
            Ok(Done::Read)
        }
    }

    fn check(&mut self, first: usize, count: usize) -> Result<Vec<Damage>> {
        self.server.watch()?;
        let mut damage = Vec::new();
        for item in first..first + count {
            self.put_get(item)?;
        }
        self.connection.send()?;
        for item in first..first + count {
            damage.extend(self.take_get(item)?);
        }
        Ok(damage)
    }

    fn take_damage(&mut self) -> Vec<Damage> {
        std::mem::take(&mut self.damage)
    }
}

impl Connection {
    fn put(&mut self, words: &[&[u8]]) -> Result<()> {
        write_command(&mut self.out, words).map_err(|error| format!("cannot write: {error}"))
    }

    fn send(&mut self) -> Result<()> {
        let result = self.stream.write_all(&self.out);
        self.out.clear();
        result.map_err(|error| format!("cannot write to redis: {error}"))
    }

    fn take(&mut self, value: &mut Vec<u8>) -> Result<Reply> {
        read_reply(&mut self.input, value).map_err(|error| format!("redis: {error}"))
    }
}

fn key(item: usize) -> String {
    format!("session:{item:08}")
}
