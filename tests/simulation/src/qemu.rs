//! Fake QEMUs: what writes a migration stream and what reads it. They keep to what QEMU does: the
//! source's guest is stopped for the last pass only, and it has migrated when the destination says
//! so on the return path; the destination's guest can run once the whole stream is there.
//!
//! Owns: the comparison of every byte that arrives with what was written. Must not: decide where a
//! guest runs after that; libvirt does.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::watch;
use tokio::time::{sleep, sleep_until};
use vmgang_stream::synthetic::StreamBuilder;

use crate::network::{Accepting, connect_local};
use crate::plan::GuestPlan;
use crate::random::Random;
use crate::world::{Here, There, World};

const PAGE_BYTES: usize = 4096;
const PONG: [u8; 8] = [0, 2, 0, 4, 0, 0, 0, 1];
const ACK: [u8; 4] = [0, 7, 0, 0];
/// "I have it all": without it the source goes on.
const SHUT: [u8; 8] = [0, 1, 0, 4, 0, 0, 0, 0];
/// A held member's limit: below a page.
const HELD_MS: u64 = 1;

type Page = [u8; PAGE_BYTES];

fn page(content: u64) -> Page {
    let mut random = Random::new(content);
    let mut page = [0; PAGE_BYTES];
    for word in page.chunks_exact_mut(8) {
        word.copy_from_slice(&random.next().to_le_bytes());
    }
    page
}

/// What a page of the guest has; `None` is zeros.
fn content(plan: &GuestPlan, random: &mut Random) -> Option<Page> {
    let [zero, uniform, shared, similar] = plan.mix;
    let dice = random.below(100);
    // From a small pool, so that guests and passes have much in common.
    let pool = random.below(40);
    if dice < zero {
        None
    } else if dice < zero + uniform {
        Some([random.below(256) as u8; PAGE_BYTES])
    } else if dice < zero + uniform + shared {
        Some(page(pool))
    } else if dice < zero + uniform + shared + similar {
        let mut page = page(pool);
        let at = random.below(PAGE_BYTES as u64 - 8) as usize;
        page[at..at + 8].copy_from_slice(&random.next().to_le_bytes());
        Some(page)
    } else {
        Some(page(random.next()))
    }
}

/// What the two directions of a source QEMU's connection tell each other.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Heard {
    ack: bool,
    shut: bool,
    ended: bool,
}

/// Runs the source's side of a migration. `Ok` means that the destination has said it has it all.
pub async fn source(world: &Arc<World>, member: usize, socket: &Path) -> Result<(), String> {
    let (reader, writer) = connect_local(world, socket, None)
        .map_err(|error| format!("Failed to connect: {error}"))?;
    world.step(format_args!("source QEMU {member} connected"));
    let heard = watch::Sender::new(Heard::default());
    let mut cancelled = world.guest(member).cancelled.subscribe();
    let migrating = async {
        tokio::select! {
            biased;
            () = listen(world, member, reader, &heard) => Err("return path broken".to_owned()),
            sent = send(world, member, writer, heard.subscribe()) => sent,
        }
    };
    tokio::select! {
        biased;
        migrated = migrating => migrated,
        _ = cancelled.wait_for(|cancelled| *cancelled) => {
            Err("operation aborted: migration out job: canceled by client".to_owned())
        }
    }
}

/// Reads the return path until it has ended in disorder.
async fn listen(
    world: &World,
    member: usize,
    mut reader: impl AsyncRead + Unpin,
    heard: &watch::Sender<Heard>,
) {
    let mut unread: Vec<u8> = Vec::new();
    let mut buffer = [0; 64];
    loop {
        let bytes = match reader.read(&mut buffer).await {
            Ok(0) | Err(_) => {
                heard.send_modify(|heard| heard.ended = true);
                if heard.borrow().shut {
                    return std::future::pending().await;
                }
                return;
            }
            Ok(len) => &buffer[..len],
        };
        let (right, released) = {
            let mut guest = world.guest(member);
            let at = guest.return_read;
            guest.return_read += bytes.len();
            (
                guest.returned.get(at..at + bytes.len()) == Some(bytes),
                guest.released.is_some(),
            )
        };
        if !right {
            world.wrong(format!("the return path of guest {member} was changed"));
        }
        unread.extend_from_slice(bytes);
        while unread.len() >= 4 {
            let len = 4 + usize::from(u16::from_be_bytes([unread[2], unread[3]]));
            if unread.len() < len {
                break;
            }
            match unread[1] {
                7 => {
                    world.step(format_args!("source QEMU {member} may switch over"));
                    if !released {
                        world.wrong(format!("guest {member} may switch over before its release"));
                    }
                    heard.send_modify(|heard| heard.ack = true);
                }
                1 => {
                    world.step(format_args!("source QEMU {member} is done"));
                    heard.send_modify(|heard| heard.shut = true);
                }
                _ => {}
            }
            unread.drain(..len);
        }
    }
}

/// The source's stream as it is written.
struct Stream<'a, W> {
    world: &'a World,
    member: usize,
    writer: W,
    builder: StreamBuilder,
    sent: usize,
}

impl<W: AsyncWrite + Unpin> Stream<'_, W> {
    async fn write(&mut self) -> Result<(), String> {
        while self.sent < self.builder.bytes().len() {
            let left = &self.builder.bytes()[self.sent..];
            let written = self.writer.write(left).await;
            let written = written.map_err(|error| format!("Unable to write to socket: {error}"))?;
            let mut guest = self.world.guest(self.member);
            guest.written.extend_from_slice(&left[..written]);
            self.sent += written;
        }
        Ok(())
    }
}

async fn send(
    world: &World,
    member: usize,
    writer: impl AsyncWrite + Unpin,
    mut heard: watch::Receiver<Heard>,
) -> Result<(), String> {
    let plan = &world.plan.guests[member];
    let mut random = Random::new(plan.seed);
    let mut stream = Stream {
        world,
        member,
        writer,
        builder: StreamBuilder::new((plan.pages * PAGE_BYTES) as u64),
        sent: 0,
    };
    stream.write().await?;
    for first in (0..plan.pages).step_by(plan.part_pages) {
        stream.builder.begin_part();
        for number in first..(first + plan.part_pages).min(plan.pages) {
            let address = (number * PAGE_BYTES) as u64;
            match content(plan, &mut random) {
                Some(page) => stream.builder.page(address, &page),
                None => stream.builder.zero(address),
            };
        }
        stream.builder.end_ram_section();
        stream.write().await?;
        sleep(Duration::from_millis(plan.part_ms)).await;
    }
    world.guest(member).first_pass_done = true;
    world.step(format_args!("source QEMU {member} ended its first pass"));
    let mut pass = 0;
    loop {
        let dirty = match pass < plan.dirty_passes {
            true => random.below(plan.dirty_pages + 1) as usize,
            false => 0,
        };
        pass += 1;
        let limit_ms = world.guest(member).limit_ms;
        if heard.borrow().ack && (dirty == 0 || limit_ms > HELD_MS) {
            break switch_over(world, member, &mut stream, dirty, &mut random).await?;
        }
        stream.builder.begin_part();
        dirty_pages(plan, &mut stream.builder, dirty, &mut random);
        stream.builder.end_ram_section();
        stream.write().await?;
        sleep(Duration::from_millis(plan.pass_ms)).await;
    }
    let heard = heard.wait_for(|heard| heard.shut || heard.ended).await;
    let shut = heard.is_ok_and(|heard| heard.shut);
    if !shut {
        return Err("the destination has not got it all".to_owned());
    }
    let _ = stream.writer.shutdown().await;
    Ok(())
}

fn dirty_pages(plan: &GuestPlan, builder: &mut StreamBuilder, count: usize, random: &mut Random) {
    let mut numbers: Vec<u64> = (0..count)
        .map(|_| random.below(plan.pages as u64))
        .collect();
    numbers.sort_unstable();
    numbers.dedup();
    for number in numbers {
        let page = content(plan, random).unwrap_or([7; PAGE_BYTES]);
        builder.page(number * PAGE_BYTES as u64, &page);
    }
}

/// The guest is stopped, and the rest is sent.
async fn switch_over(
    world: &World,
    member: usize,
    stream: &mut Stream<'_, impl AsyncWrite + Unpin>,
    dirty: usize,
    random: &mut Random,
) -> Result<(), String> {
    let plan = &world.plan.guests[member];
    world.set_here(member, Here::Paused);
    stream.builder.switchover_start().begin_end();
    dirty_pages(plan, &mut stream.builder, dirty, random);
    stream.builder.end_ram_section();
    let device: Vec<u8> = (0..plan.device_bytes)
        .map(|_| random.below(4) as u8)
        .collect();
    // A full section, and the end of the stream.
    stream.builder.raw(&[4]).raw(&device).raw(&[0]);
    stream.write().await?;
    world.guest(member).whole = true;
    world.step(format_args!("source QEMU {member} has written all"));
    Ok(())
}

/// Runs the destination's side until the connection ends. What becomes of the guest shows in
/// [`There`].
pub async fn destination(world: Arc<World>, member: usize, mut accepting: Accepting) {
    let Some((reader, writer)) = accepting.next().await else {
        return;
    };
    world.step(format_args!("destination QEMU {member} connected"));
    load(&world, member, reader, &SharedWriter::new(Some(writer))).await;
}

/// A writer that two parts of a QEMU use.
type SharedWriter = tokio::sync::Mutex<Option<Box<dyn AsyncWrite + Send + Unpin>>>;

async fn say(world: &World, member: usize, writer: &SharedWriter, message: &[u8]) {
    let mut writer = writer.lock().await;
    let Some(writer) = writer.as_mut() else {
        return;
    };
    world.guest(member).returned.extend_from_slice(message);
    // Torn as the socket may tear it. A source that is gone is noticed when reading.
    let cut = world.random().below(message.len() as u64) as usize;
    for part in [&message[..cut], &message[cut..]] {
        let _ = writer.write_all(part).await;
        tokio::task::yield_now().await;
    }
}

async fn load(
    world: &World,
    member: usize,
    mut reader: Box<dyn AsyncRead + Send + Unpin>,
    writer: &SharedWriter,
) {
    let plan = &world.plan.guests[member];
    let ack = async {
        sleep(Duration::from_millis(plan.ack_ms)).await;
        if plan.seed.is_multiple_of(2) {
            say(world, member, writer, &PONG).await;
        }
        world.guest(member).ack_said = true;
        say(world, member, writer, &ACK).await;
        std::future::pending::<()>().await;
    };
    let reading = async {
        let mut buffer = vec![0; 32 * 1024];
        loop {
            let from = world.guest(member).reads_from;
            sleep_until(from).await;
            let bytes = match reader.read(&mut buffer).await {
                Ok(0) | Err(_) => return false,
                Ok(len) => &buffer[..len],
            };
            let (right, whole) = {
                let mut guest = world.guest(member);
                let at = guest.read;
                guest.read += bytes.len();
                (
                    guest.written.get(at..at + bytes.len()) == Some(bytes),
                    guest.whole && guest.read == guest.written.len(),
                )
            };
            world.step(format_args!(
                "destination QEMU {member} read {}",
                bytes.len()
            ));
            if !right {
                world.wrong(format!("the stream of guest {member} was changed"));
                return false;
            }
            if whole {
                return true;
            }
            let time = bytes.len() as u64 / plan.load_bytes_per_ms;
            sleep(Duration::from_millis(time)).await;
        }
    };
    let whole = tokio::select! {
        biased;
        () = ack => false,
        whole = reading => whole,
    };
    if !whole {
        return;
    }
    sleep(Duration::from_millis(plan.device_ms)).await;
    world.set_there(member, There::Loaded);
    say(world, member, writer, &SHUT).await;
    *writer.lock().await = None;
    // The source closes the connection.
    let mut rest = [0; 64];
    while matches!(reader.read(&mut rest).await, Ok(len) if len > 0) {
        world.wrong(format!("guest {member} was sent more than there is"));
    }
}
