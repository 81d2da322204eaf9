//! Who had from whom what it did not have to send: the pages of the row's member that went as references
//! to what the column's had sent first.

use maud::{Markup, html};

use crate::record::Timeline;
use crate::units;

const PAGE_BYTES: u64 = 4096;
/// With more, cells are small and have no numbers.
const NUMBERED_MAX: usize = 10;

pub(crate) fn draw(timeline: &Timeline) -> Markup {
    let members = timeline.members.len();
    let rows = &timeline.shared_pages;
    // Of another form, or nothing but zeros: nothing to show.
    let whole = rows.len() == members && rows.iter().all(|row| row.len() == members + 2);
    let most = rows.iter().flatten().copied().max().unwrap_or(0);
    if !whole || most == 0 {
        return html! {};
    }
    let used = |column: usize| rows.iter().any(|row| row[column] > 0);
    let columns: Vec<usize> = (0..members)
        .chain((members..members + 2).filter(|column| used(*column)))
        .collect();
    let numbered = members <= NUMBERED_MAX;
    let head = |column: usize| match column.checked_sub(members) {
        None => (column + 1).to_string(),
        Some(0) => "prepared".to_owned(),
        Some(_) => "was there".to_owned(),
    };
    html! {
        section {
            h2 { "Who shared with whom" }
            p.quiet {
                "How much of each member's memory was not sent, because the member of the column had sent the same before"
                @if columns.len() > members { ", or because it was at the destination already" }
                "."
            }
            div.scroll {
                table.matrix.numbered[numbered] {
                    thead { tr {
                        td {}
                        @for column in &columns { th scope="col" { @if numbered || *column >= members { (head(*column)) } } }
                    } }
                    tbody { @for (at, row) in rows.iter().enumerate() {
                        tr {
                            th scope="row" title=(timeline.members[at].name) { @if numbered { span.number { (at + 1) } " " } (timeline.members[at].name) }
                            @for column in &columns {
                                @let pages = row[*column];
                                @let bytes = units::bytes(pages.saturating_mul(PAGE_BYTES));
                                @let strength = units::percent_of(pages, most);
                                td style=(format!("--strength:{strength:.0}%")) data-strong[strength > 55.0] title=(bytes) {
                                    @if numbered && pages > 0 { (bytes) }
                                }
                            }
                        }
                    } }
                }
            }
        }
    }
}
