//! `vmgang gang ...`: which domains belong together.

use serde_json::json;
use zbus::Connection;

use crate::arguments::GangCommand;
use crate::{exit, proxies, text};

pub async fn run(connection: &Connection, command: GangCommand) -> anyhow::Result<u8> {
    let manager = proxies::manager(connection).await?;
    match command {
        GangCommand::List { json } => {
            let (gangs, problems) = manager.list_gangs().await?;
            for (_, problem) in &problems {
                eprintln!("{}", text::complaint(problem));
            }
            if json {
                let gangs: Vec<_> = gangs
                    .iter()
                    .map(|(name, active, total)| json!({"gang": name, "running": active, "members": total}))
                    .collect();
                println!("{}", json!(gangs));
            } else if gangs.is_empty() {
                println!(
                    "There is no gang on this host; `vmgang gang add GANG DOMAIN...` makes one."
                );
            } else {
                let rows: Vec<_> = gangs
                    .iter()
                    .map(|(name, active, total)| {
                        vec![text::plain(name), active.to_string(), total.to_string()]
                    })
                    .collect();
                print!("{}", text::table(&["GANG", "RUNNING", "MEMBERS"], &rows));
            }
        }
        GangCommand::Show { gang, json } => {
            let members = manager.get_gang(&gang).await?;
            if json {
                let members: Vec<_> = members
                    .iter()
                    .map(|(name, uuid, state, order, memory, persistent)| {
                        json!({
                            "name": name, "uuid": uuid, "state": state,
                            "order": (*order >= 0).then_some(order),
                            "memory_bytes": memory, "persistent": persistent,
                        })
                    })
                    .collect();
                println!("{}", json!(members));
            } else {
                let rows: Vec<_> = members
                    .iter()
                    .map(|(name, _, state, order, memory, _)| {
                        let order = if *order < 0 {
                            "-".into()
                        } else {
                            order.to_string()
                        };
                        vec![
                            text::plain(name),
                            state.clone(),
                            text::bytes(*memory),
                            order,
                        ]
                    })
                    .collect();
                print!(
                    "{}",
                    text::table(&["DOMAIN", "STATE", "MEMORY", "ORDER"], &rows)
                );
            }
        }
        GangCommand::Add { gang, domains } => {
            let changed = manager.add_to_gang(&gang, &domains).await?;
            match changed.as_slice() {
                [] => println!("All of them are in the gang '{gang}' already."),
                changed => println!("Added to the gang '{gang}': {}", changed.join(", ")),
            }
        }
        GangCommand::Remove { gang, domains } => {
            let changed = manager.remove_from_gang(&gang, &domains).await?;
            println!("Removed from the gang '{gang}': {}", changed.join(", "));
        }
    }
    Ok(exit::MIGRATED)
}
