//! The command line's grammar. What is not here is refused by name, with exit code 2.

use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};

/// Migrates gangs of virtual machines as one job.
#[derive(Parser, Debug)]
#[command(name = "vmgang", version, arg_required_else_help = true)]
pub struct Arguments {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand, Debug)]
pub enum Command {
    /// Show gangs, and say which domains belong to one
    #[command(subcommand)]
    Gang(GangCommand),
    /// Tell what a migration of a gang would send, and who shares how much with whom
    Estimate(EstimateOptions),
    /// Send what a gang has to its destination beforehand, for a migration that begins soon
    Prepare(PrepareOptions),
    /// Migrate a gang, or the named domains, or all, to another host
    Migrate(MigrateOptions),
    /// Bring the members of an ended job back to this host
    ///
    /// The host on which they are now migrates them. It must let this one use its libvirt (allow_libvirt).
    /// What is not as it was when they left is named, and members that cannot come stay where they are.
    Return(ReturnOptions),
    /// Show running jobs and stages, or one of them
    Status(StatusOptions),
    /// Stop a job: what has not switched over stays where it is; or drop a stage
    Abort {
        /// Id of the job or stage, or the beginning of it
        job: String,
    },
    /// Switch a running job to post-copy now (it was started with --postcopy, --timeout-postcopy or
    /// --on-stall postcopy)
    Postcopy {
        /// Id of the job, or the beginning of it
        job: String,
    },
    /// Change how much of the network a running job uses
    Bandwidth {
        /// Id of the job, or the beginning of it
        job: String,
        /// At most so much; 0 is no limit
        #[arg(value_name = "MIB/S")]
        mib_per_s: u64,
    },
    /// Show ended jobs, or what became of one
    History(HistoryOptions),
    /// Look for what would refuse a migration, and for what could be better
    ///
    /// Without a destination it looks at this host alone. Exit code 0: a migration would not be
    /// refused; 1: it would be, or vmgangd could not look.
    Doctor(DoctorOptions),
}

#[derive(Subcommand, Debug)]
pub enum GangCommand {
    /// List all gangs on this host
    List {
        #[arg(long)]
        json: bool,
    },
    /// List the members of a gang
    Show {
        gang: String,
        #[arg(long)]
        json: bool,
    },
    /// Put domains into a gang
    Add {
        gang: String,
        #[arg(required = true, value_name = "DOMAIN")]
        domains: Vec<String>,
    },
    /// Take domains out of a gang
    Remove {
        gang: String,
        #[arg(required = true, value_name = "DOMAIN")]
        domains: Vec<String>,
    },
}

#[derive(Args, Debug)]
pub struct EstimateOptions {
    pub gang: String,
    /// Print one JSON object and nothing else
    #[arg(long)]
    pub json: bool,
    /// Draw who shares how much with whom into this file
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub struct PrepareOptions {
    pub gang: String,
    /// A libvirt URI or host name
    #[arg(value_name = "DESTURI")]
    pub destination: String,
    /// Keep it for so long: 90s, 30m, 2h; a number alone is seconds
    #[arg(long = "for", value_name = "DURATION", default_value = "1h", value_parser = duration)]
    pub time: Duration,
    /// Use at most so much of the network
    #[arg(long, value_name = "MIB/S", value_parser = clap::value_parser!(u64).range(1..))]
    pub bandwidth: Option<u64>,
    /// Where the destination's vmgangd listens [default: the destination's host, port 16520]
    #[arg(long, value_name = "HOST:PORT")]
    pub peer: Option<String>,
    /// Print the stage as one JSON object and nothing else
    #[arg(long)]
    pub json: bool,
    /// Print nothing but errors
    #[arg(long)]
    pub quiet: bool,
}

/// Reads a duration as people write it.
fn duration(text: &str) -> Result<Duration, String> {
    match text.parse() {
        Ok(seconds) => Ok(Duration::from_secs(seconds)),
        Err(_) => humantime::parse_duration(text).map_err(|error| error.to_string()),
    }
}

#[derive(Args, Debug)]
#[command(
    group = ArgGroup::new("selection").args(["domains", "all"]),
    override_usage = "vmgang migrate [OPTIONS] GANG DESTURI\n       \
                      vmgang migrate [OPTIONS] --domains A,B,C DESTURI\n       \
                      vmgang migrate [OPTIONS] --all DESTURI"
)]
pub struct MigrateOptions {
    /// The gang (not with --domains or --all), then the destination: a libvirt URI, or a host name alone,
    /// whose libvirt is then reached over its vmgangd
    #[arg(required = true, num_args = 1..=2, value_names = ["GANG", "DESTURI"])]
    pub targets: Vec<String>,
    /// Migrate these domains instead of a gang
    #[arg(long, value_delimiter = ',', value_name = "A,B,C")]
    pub domains: Option<Vec<String>>,
    /// Migrate every running domain
    #[arg(long)]
    pub all: bool,
    #[command(flatten)]
    pub job: JobOptions,
    /// After --timeout suspend the guests, so that they converge, instead of aborting; they run
    /// again at the destination
    #[arg(long, requires = "timeout", conflicts_with = "timeout_postcopy")]
    pub timeout_suspend: bool,
    /// After --timeout go to post-copy instead of aborting
    #[arg(long, requires = "timeout")]
    pub timeout_postcopy: bool,
    /// Where the destination's vmgangd listens [default: the destination's host, port 16520]
    #[arg(long, value_name = "HOST:PORT")]
    pub peer: Option<String>,
    /// Make the domains persistent on the destination
    #[arg(long)]
    pub persistent: bool,
    /// Remove the domains' definitions here
    #[arg(long)]
    pub undefinesource: bool,
    /// Leave the guests paused on the destination
    #[arg(long)]
    pub suspend: bool,
    /// What is done about a member that dirties memory as fast as it can be sent: its guest is slowed
    /// down, it goes to post-copy, it is left here, or all is aborted
    #[arg(long, value_name = "WHAT", default_value = "throttle")]
    pub on_stall: OnStall,
    /// Members under way at once; of more, the next one begins when one is done [default: 12]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub concurrency: Option<u64>,
    /// Go on with a post-copy that a broken link has stopped
    #[arg(long, conflicts_with_all = ["postcopy", "timeout_postcopy"])]
    pub postcopy_resume: bool,
    /// Send each member's pages over so many connections of QEMU (multifd), 0 for none beside its main
    /// one [default: 2 with QEMU 9.0 and later, but for post-copy]
    #[arg(long, value_name = "N")]
    pub parallel: Option<u64>,
    /// Let QEMU slow guests down from the start, as in virsh
    #[arg(long)]
    pub auto_converge: bool,
    /// Before the move let each guest give up the memory it does not need, through its memory balloon,
    /// and give it back after
    #[arg(long)]
    pub balloon: bool,
    /// Migrate also where libvirt cannot tell that the disks are safe
    #[arg(long = "unsafe")]
    pub unsafe_disks: bool,
    /// Refused: disks are not moved; use storage that both hosts share
    #[arg(long, hide = true)]
    pub copy_storage_all: bool,
    /// Refused: disks are not moved; use storage that both hosts share
    #[arg(long, hide = true)]
    pub copy_storage_inc: bool,
    /// Ways of saving bytes: comma list of uniform, page, rehash, delta, similar, sub-page, zstd; or
    /// default, all, or none
    #[arg(long, value_name = "LIST")]
    pub technique: Option<String>,
}

/// What every job is told, wherever it takes its members.
#[derive(Args, Debug)]
pub struct JobOptions {
    /// Use at most so much of the network
    #[arg(long, value_name = "MIB/S", value_parser = clap::value_parser!(u64).range(1..))]
    pub bandwidth: Option<u64>,
    /// Abort if the gang is not ready to switch over after so many seconds
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u64).range(1..))]
    pub timeout: Option<u64>,
    /// What a member's failure before the switchover does to the others
    #[arg(long, value_name = "WHAT", default_value = "abort")]
    pub on_failure: OnFailure,
    /// Let members go all at once, one by one (each with the whole link for its last pass), or each
    /// as soon as it is ready [default: together, or in turn if not all are under way at once]
    #[arg(long, value_name = "HOW")]
    pub switchover: Option<Switchover>,
    /// Go to post-copy after the first pass: guests go on at the destination and fetch the rest of
    /// their memory from the source. If the link breaks then, they stop until migrate --postcopy-resume
    #[arg(long)]
    pub postcopy: bool,
    /// Print the result as one JSON object and nothing else
    #[arg(long)]
    pub json: bool,
    /// Print nothing but errors
    #[arg(long)]
    pub quiet: bool,
}

#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnFailure {
    Abort,
    Continue,
}

#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnStall {
    Throttle,
    Postcopy,
    Leave,
    Abort,
}

impl OnStall {
    pub fn as_str(self) -> &'static str {
        match self {
            OnStall::Throttle => "throttle",
            OnStall::Postcopy => "postcopy",
            OnStall::Leave => "leave",
            OnStall::Abort => "abort",
        }
    }
}

#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum Switchover {
    Together,
    Staggered,
    Free,
}

impl Switchover {
    pub fn as_str(self) -> &'static str {
        match self {
            Switchover::Together => "together",
            Switchover::Staggered => "staggered",
            Switchover::Free => "free",
        }
    }
}

impl MigrateOptions {
    /// The gang (empty if none is meant) and the destination.
    pub fn gang_and_destination(&self) -> Result<(&str, &str), clap::Error> {
        let selected = self.all || self.domains.is_some();
        let usage = |text: &str| {
            use clap::CommandFactory;
            Arguments::command().error(clap::error::ErrorKind::WrongNumberOfValues, text)
        };
        match (self.targets.as_slice(), selected) {
            ([gang, destination], false) => Ok((gang, destination)),
            ([destination], true) => Ok(("", destination)),
            ([_], false) => Err(usage(
                "give a gang and a destination: vmgang migrate GANG DESTURI",
            )),
            _ => Err(usage(
                "with --domains or --all give only the destination, no gang",
            )),
        }
    }
}

#[derive(Args, Debug)]
pub struct ReturnOptions {
    /// Id of the job that has moved them, or the beginning of it
    #[arg(value_name = "JOB")]
    pub of: String,
    /// This host as the other one reaches it [default: named as the other one was]
    #[arg(value_name = "DESTURI")]
    pub destination: Option<String>,
    #[command(flatten)]
    pub job: JobOptions,
    /// Where this host's vmgangd listens for the other one [default: this host's name, port 16520]
    #[arg(long, value_name = "HOST:PORT")]
    pub peer: Option<String>,
}

#[derive(Args, Debug)]
pub struct StatusOptions {
    /// Id of the job or stage, or the beginning of it
    pub job: Option<String>,
    /// Follow the job to its end
    #[arg(long)]
    pub watch: bool,
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Debug)]
pub struct HistoryOptions {
    /// Id of the job, or the beginning of it
    pub job: Option<String>,
    /// Write a page about the job into this file: what happened when, what moved, and who shared with whom
    #[arg(long, value_name = "FILE", requires = "job")]
    pub html: Option<PathBuf>,
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Debug)]
pub struct DoctorOptions {
    /// A libvirt URI or host name, as for migrate
    #[arg(value_name = "DESTURI")]
    pub destination: Option<String>,
    /// Look at this gang only [default: all gangs that run here]
    #[arg(long)]
    pub gang: Option<String>,
    /// Where the destination's vmgangd listens [default: the destination's host, port 16520]
    #[arg(long, value_name = "HOST:PORT", requires = "destination")]
    pub peer: Option<String>,
    /// Print one JSON object and nothing else
    #[arg(long)]
    pub json: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Arguments, clap::Error> {
        Arguments::try_parse_from(line.split(' '))
    }

    fn migrate(line: &str) -> MigrateOptions {
        match parse(line).expect(line).command {
            Command::Migrate(options) => options,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_grammar_is_sound() {
        use clap::CommandFactory;
        Arguments::command().debug_assert();
    }

    #[test]
    fn the_three_forms_of_migrate() {
        let options = migrate("vmgang migrate web qemu+tls://b/system --on-failure continue");
        assert_eq!(
            options.gang_and_destination().expect("both"),
            ("web", "qemu+tls://b/system")
        );
        assert_eq!(options.job.on_failure, OnFailure::Continue);
        let options = migrate("vmgang migrate --domains a,b,c b");
        assert_eq!(options.gang_and_destination().expect("one"), ("", "b"));
        assert_eq!(
            options.domains,
            Some(vec!["a".into(), "b".into(), "c".into()])
        );
        let options = migrate("vmgang migrate --all b --timeout 60 --bandwidth 100");
        assert_eq!(options.gang_and_destination().expect("one"), ("", "b"));
        assert!(
            migrate("vmgang migrate web")
                .gang_and_destination()
                .is_err()
        );
        assert!(
            migrate("vmgang migrate web b --all")
                .gang_and_destination()
                .is_err()
        );
    }

    #[test]
    fn a_return_takes_what_any_job_takes() {
        let line = "vmgang return 12ab b --bandwidth 5 --timeout 60 --on-failure continue --switchover free --postcopy --quiet";
        let Command::Return(options) = parse(line).expect("taken").command else {
            panic!("{line}");
        };
        assert_eq!(
            (&*options.of, options.destination.as_deref()),
            ("12ab", Some("b"))
        );
        let job = options.job;
        assert_eq!((job.bandwidth, job.timeout), (Some(5), Some(60)));
        assert_eq!(job.on_failure, OnFailure::Continue);
        assert_eq!(job.switchover, Some(Switchover::Free));
        assert!(job.postcopy && job.quiet && !job.json);
    }

    #[test]
    fn the_doctor_needs_no_destination_but_a_peer_does() {
        assert!(parse("vmgang doctor").is_ok());
        assert!(parse("vmgang doctor b --gang web --peer b:1 --json").is_ok());
        let error = parse("vmgang doctor --peer b:1").expect_err("refused");
        assert_eq!(error.exit_code(), 2);
    }

    #[test]
    fn durations_as_people_write_them() {
        let time = |text: &str| match parse(&format!("vmgang prepare web b {text}")) {
            Ok(Arguments {
                command: Command::Prepare(options),
            }) => options.time.as_secs(),
            other => panic!("{other:?}"),
        };
        assert_eq!(time("--quiet"), 3600);
        assert_eq!(time("--for 90"), 90);
        assert_eq!(time("--for 90s"), 90);
        assert_eq!(time("--for 30m"), 1800);
        assert_eq!(time("--for 2h"), 7200);
    }

    #[test]
    fn what_it_cannot_do_is_refused_by_name() {
        for (line, named) in [
            ("vmgang migrate web b --zerocopy", "--zerocopy"),
            ("vmgang migrate web b --switchover soon", "soon"),
            ("vmgang migrate web b --on-stall hope", "hope"),
            ("vmgang migrate web b --timeout-suspend", "--timeout"),
            ("vmgang migrate web b --concurrency 0", "--concurrency"),
            (
                "vmgang migrate web b --postcopy --postcopy-resume",
                "--postcopy",
            ),
            ("vmgang bandwidth 12ab", "MIB/S"),
            ("vmgang migrate web b --timeout 0", "--timeout"),
            ("vmgang migrate web b --on-failure hope", "hope"),
            ("vmgang migrate --all --domains a b", "--domains"),
            ("vmgang prepare web", "DESTURI"),
            ("vmgang prepare web b --for soon", "--for"),
            ("vmgang prepare web b --technique all", "--technique"),
            ("vmgang gang add web", "DOMAIN"),
            ("vmgang history --html page.html", "JOB"),
        ] {
            let error = parse(line).expect_err(line);
            // `exit::USAGE`, which the manuals example does not have.
            assert_eq!(error.exit_code(), 2, "{line}");
            assert!(error.to_string().contains(named), "{line}: {error}");
        }
    }
}
