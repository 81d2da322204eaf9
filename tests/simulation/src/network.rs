//! The network as the daemons see it: what the engine's `Network` is in a simulation, with the
//! faults of the plan. A daemon that has died reaches nobody any more.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use vmgang_engine::{
    Connection, Execute, Network, PeerAddress, PeerListener, Pending, QemuConnection, QemuListener,
    SocketOwner,
};

use crate::pipe::{self, End, Shape};
use crate::world::{Life, World};

/// A peer that has connected.
pub type PeerConnection = End;

/// A daemon's network.
pub struct DaemonNetwork {
    pub world: Arc<World>,
    pub life: Arc<Life>,
}

impl fmt::Debug for DaemonNetwork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DaemonNetwork")
    }
}

fn refused() -> io::Error {
    io::ErrorKind::ConnectionRefused.into()
}

impl Network for DaemonNetwork {
    fn connect(&self, peer: &PeerAddress) -> Pending<'static, Box<dyn Connection>> {
        let (world, life, host) = (self.world.clone(), self.life.clone(), peer.host.clone());
        Box::pin(async move {
            let delay = world.plan.link.delay_ms.1;
            tokio::time::sleep(Duration::from_millis(delay)).await;
            if !life.alive() {
                return Err(refused());
            }
            let (number, near) = {
                let mut net = world.net();
                let (far_life, accepting) = net.peers.get(&host).cloned().ok_or_else(refused)?;
                let number = net.links.len();
                let direction = |to_destination| {
                    let faults = world.plan.link_faults.iter();
                    let faults = faults
                        .filter(|f| f.connection == number && f.to_destination == to_destination)
                        .map(|f| f.fault)
                        .collect();
                    (world.plan.link.clone(), faults)
                };
                let directions = [direction(true), direction(false)];
                let (near, far, link) = pipe::connection(directions, &mut world.random());
                accepting.send(far).map_err(|_| refused())?;
                net.links.push(link.clone());
                net.ends.push((life, link.clone()));
                net.ends.push((far_life, link));
                (number, near)
            };
            world.step(format_args!("connection {number} to {host}"));
            Ok(Box::new(near) as Box<dyn Connection>)
        })
    }

    fn listen(&self, socket: &Path, _: SocketOwner) -> io::Result<Box<dyn QemuListener>> {
        let accepting = listen(&self.world, socket, Some(&self.life))?;
        Ok(Box::new(SourceSocket {
            accepting,
            life: self.life.clone(),
        }))
    }

    fn connect_qemu(&self, socket: &Path, _: SocketOwner) -> Pending<'static, QemuConnection> {
        let connected = match self.life.alive() {
            true => connect_local(&self.world, socket, Some(&self.life)),
            false => Err(refused()),
        };
        Box::pin(async move { connected })
    }

    fn secret(&self) -> [u8; 16] {
        let mut random = self.world.random();
        let mut secret = [0; 16];
        secret[..8].copy_from_slice(&random.next().to_le_bytes());
        secret[8..].copy_from_slice(&random.next().to_le_bytes());
        secret
    }
}

/// Connections to a socket of the simulated hosts; it is gone when this is dropped.
pub struct Accepting {
    world: Arc<World>,
    socket: PathBuf,
    connections: mpsc::UnboundedReceiver<QemuConnection>,
}

impl Accepting {
    pub async fn next(&mut self) -> Option<QemuConnection> {
        self.connections.recv().await
    }
}

impl Drop for Accepting {
    fn drop(&mut self) {
        self.world.net().sockets.remove(&self.socket);
    }
}

/// Makes a socket. Its directory must be there.
pub fn listen(
    world: &Arc<World>,
    socket: &Path,
    life: Option<&Arc<Life>>,
) -> io::Result<Accepting> {
    if !socket.parent().is_some_and(Path::is_dir) {
        return Err(io::ErrorKind::NotFound.into());
    }
    let (sender, connections) = mpsc::unbounded_channel();
    let taken = world
        .net()
        .sockets
        .insert(socket.to_owned(), (life.cloned(), sender));
    if taken.is_some() {
        return Err(io::ErrorKind::AddrInUse.into());
    }
    Ok(Accepting {
        world: world.clone(),
        socket: socket.to_owned(),
        connections,
    })
}

/// Connects to a socket, on behalf of a daemon or of a QEMU.
pub fn connect_local(
    world: &World,
    socket: &Path,
    life: Option<&Arc<Life>>,
) -> io::Result<QemuConnection> {
    let shape = Shape::local(world.plan.socket_bytes);
    let directions = [(shape.clone(), Vec::new()), (shape, Vec::new())];
    let (near, far, link) = pipe::connection(directions, &mut world.random());
    let mut net = world.net();
    let (far_life, accepting) = net.sockets.get(socket).ok_or(io::ErrorKind::NotFound)?;
    let far_life = far_life.clone();
    accepting
        .send((Box::new(far.reader), Box::new(far.writer)))
        .map_err(|_| refused())?;
    for life in [life.cloned(), far_life].into_iter().flatten() {
        net.ends.push((life, link.clone()));
    }
    Ok((Box::new(near.reader), Box::new(near.writer)))
}

struct SourceSocket {
    accepting: Accepting,
    life: Arc<Life>,
}

impl QemuListener for SourceSocket {
    fn accept(&mut self) -> Pending<'_, QemuConnection> {
        Box::pin(async {
            match self.accepting.next().await {
                Some(connection) if self.life.alive() => Ok(connection),
                _ => std::future::pending().await,
            }
        })
    }
}

/// A daemon's port.
pub struct Port {
    pub connections: mpsc::UnboundedReceiver<PeerConnection>,
}

impl Port {
    pub fn open(world: &World, life: &Arc<Life>) -> Port {
        let (sender, connections) = mpsc::unbounded_channel();
        let mut net = world.net();
        net.peers
            .insert(life.host.to_owned(), (life.clone(), sender));
        Port { connections }
    }
}

impl PeerListener for Port {
    fn accept(&mut self) -> Pending<'_, (Box<dyn Connection>, SocketAddr)> {
        Box::pin(async {
            match self.connections.recv().await {
                Some(end) => Ok((
                    Box::new(end) as Box<dyn Connection>,
                    ([10, 0, 0, 1], 1).into(),
                )),
                None => std::future::pending().await,
            }
        })
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(([10, 0, 0, 2], 16520).into())
    }
}

/// Work that is done later, or at once, on the only thread there is.
pub struct Executor {
    pub world: Arc<World>,
}

impl fmt::Debug for Executor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Executor")
    }
}

impl Execute for Executor {
    fn execute(&self, work: Box<dyn FnOnce() + Send>) {
        let most = self.world.plan.work_ms;
        let delay = match most {
            0 => 0,
            most => self.world.random().below(most + 1),
        };
        if delay == 0 {
            return work();
        }
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(delay)).await;
            work();
        });
    }

    fn threads(&self) -> usize {
        self.world.plan.threads
    }
}
