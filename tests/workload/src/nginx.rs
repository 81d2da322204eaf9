//! The role nginx: Debian's own configuration, a web root full of files, under requests.

use std::fs;
use std::io::BufReader;
use std::net::TcpStream;

use crate::content::{Content, Values};
use crate::http;
use crate::server::Server;
use crate::workload::{Damage, Done, Result, Workload, compare};

const PORT: u16 = 80;
const WEB_ROOT: &str = "/var/www/html";

pub struct Nginx {
    server: Server,
    content: Content,
    files: usize,
    /// `None` after the server has closed it, as it does from time to time.
    connection: Option<BufReader<TcpStream>>,
    damage: Vec<Damage>,
    expected: Vec<u8>,
    found: Vec<u8>,
}

impl Nginx {
    /// Writes so many bytes of files and starts the server.
    pub fn start(seed: u64, data_bytes: u64) -> Result<Nginx> {
        let content = Content {
            seed,
            values: Values::Mixed,
            bytes_min: 8192,
        };
        let files = (data_bytes / content.bytes_mean() as u64).max(1) as usize;
        let mut bytes = Vec::new();
        for file in 0..files {
            content.write(file, 0, &mut bytes);
            let path = format!("{WEB_ROOT}/{}", name(file));
            fs::write(&path, &bytes).map_err(|error| format!("cannot write {path}: {error}"))?;
        }
        let mut server = Server::start("nginx", "/usr/sbin/nginx", &["-g", "daemon off;"])?;
        let connection = Some(BufReader::new(server.connect(PORT)?));
        Ok(Nginx {
            server,
            content,
            files,
            connection,
            damage: Vec::new(),
            expected: Vec::new(),
            found: Vec::new(),
        })
    }

    fn get(&mut self, file: usize) -> Result<Option<Damage>> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => BufReader::new(self.server.connect(PORT)?),
        };
        let path = format!("/{}", name(file));
        let failed = |error| format!("nginx, GET {path}: {error}");
        http::write_get(connection.get_mut(), &path).map_err(failed)?;
        let answer = http::read_answer(&mut connection, &mut self.found).map_err(failed)?;
        if !answer.closes {
            self.connection = Some(connection);
        }
        if answer.status != 200 {
            return Ok(Some(Damage {
                item: file,
                what: format!("status={}", answer.status),
            }));
        }
        self.content.write(file, 0, &mut self.expected);
        Ok(compare(file, &self.expected, &self.found))
    }
}

impl Workload for Nginx {
    fn items(&self) -> usize {
        self.files
    }

    fn request(&mut self, random: u64) -> Result<Done> {
        self.server.watch()?;
        let damage = self.get((random >> 8) as usize % self.files)?;
        self.damage.extend(damage);
        Ok(Done::Read)
    }

    fn check(&mut self, first: usize, count: usize) -> Result<Vec<Damage>> {
        let mut damage = Vec::new();
        for file in first..first + count {
            damage.extend(self.get(file)?);
        }
        Ok(damage)
    }

    fn take_damage(&mut self) -> Vec<Damage> {
        std::mem::take(&mut self.damage)
    }
}

fn name(file: usize) -> String {
    format!("{file:06}.html")
}
