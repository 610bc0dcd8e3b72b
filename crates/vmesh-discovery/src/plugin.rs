//! The plug-in source: an external program reads a registry of any kind and exchanges JSON lines with vmesh.
//!
//! vmesh starts the program and sends it the name of the source; the program prints complete views. See
//! [`protocol`] for the lines. The program runs until its standard input is closed.
//!
//! | event | reaction |
//! |---|---|
//! | the program prints a line | handles it: a view, a failure, or a sign that the program is alive |
//! | no line for `silence` | kills the program and starts it again |
//! | the program ends | reports a failure; the next call starts it again |
//! | a host name resolves to other addresses | updates the endpoints |
//!
//! If a program fails, hangs, prints invalid lines or is missing, its last good view stays in force, marked
//! stale. A plug-in is subject to the same guard as any other registry.

mod config;
mod connection;
mod log;
pub mod protocol;
mod run;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use vmesh_model::{Registration, ServiceName};

use crate::assemble::{Assembler, FIRST_NAMES, ServiceContent, ServiceStatement, Statement};
use crate::resolve::SystemResolver;
use crate::source::{Counters, Registrations, Source, SourceError};
pub use config::PluginConfig;
use connection::PluginConnection;
use protocol::PluginView;

/// A source that reads services from the output of a program.
pub struct PluginSource {
    name: Arc<str>,
    connection: PluginConnection,
    assembler: Assembler<SystemResolver>,
    statement: Option<Statement>,
    /// The services from before a restart, for those that cannot be read now.
    restored: BTreeMap<ServiceName, Arc<Registration>>,
    last_view: Option<Registrations>,
    /// Since when the first view has been waiting for host names.
    first_names: Option<Instant>,
    /// An error was reported since the last view, so the next view is returned even if it equals the one
    /// before.
    has_failed: bool,
    confirmations: u64,
}

impl PluginSource {
    /// Creates a plug-in source. `last_good` is the view from before a restart.
    pub fn new(
        config: PluginConfig,
        last_good: Option<&Registrations>,
        counters: Arc<Counters>,
    ) -> PluginSource {
        let name = config.name();
        let assembler = Assembler::new(name.clone(), SystemResolver, config.resolve_interval, last_good);
        let restored = last_good.into_iter().flat_map(|last_good| &last_good.services);
        let restored =
            restored.map(|(name, service_view)| (name.clone(), service_view.registration.clone())).collect();
        PluginSource {
            name,
            connection: PluginConnection::new(config, counters),
            assembler,
            statement: None,
            restored,
            last_view: None,
            first_names: None,
            has_failed: false,
            confirmations: 0,
        }
    }

    /// Takes a view. An unchanged service keeps its pointer, and an unreadable service keeps its last good
    /// state.
    fn take_view(&mut self, view: PluginView) {
        let parsed = view.parsed;
        let before = self.statement.take().unwrap_or_default().services;
        let mut statement = Statement { problems: parsed.problems, ..Statement::default() };
        for service in parsed.services {
            let name = service.name.clone();
            let same = before.get(&name).and_then(|statement_before| match &statement_before.content {
                ServiceContent::Parsed(known) if **known == service => Some(known.clone()),
                _ => None,
            });
            statement
                .services
                .insert(name, ServiceStatement::fresh(same.unwrap_or_else(|| Arc::new(service))));
        }
        let because: Arc<str> = format!("its record from `{}` cannot be read", self.name).into();
        for name in parsed.unreadable {
            let known = before.get(&name).map(|statement_before| statement_before.content.clone());
            let known = known.or_else(|| self.restored.get(&name).cloned().map(ServiceContent::Restored));
            match known {
                Some(known) => {
                    _ = statement.services.insert(name, ServiceStatement::stale(known, because.clone()))
                }
                None => statement.left_out.push(format!("service `{name}`: {because}").into()),
            }
        }
        if parsed.has_unnamed {
            let unnamed: Arc<str> =
                format!("`{}` lists a service whose name cannot be read", self.name).into();
            statement.left_out.push(unnamed.clone());
            // A service that is no longer listed may be the one without a readable name.
            for (name, statement_before) in before {
                statement
                    .services
                    .entry(name)
                    .or_insert_with(|| ServiceStatement::stale(statement_before.content, unnamed.clone()));
            }
        }
        // The view does not list these services, so they are removed; a later read failure must not bring
        // back their state from before the restart.
        self.restored.retain(|name, _| statement.services.contains_key(name));
        self.assembler.request_names(statement.services.values(), false);
        self.statement = Some(statement);
    }

    /// Handles a line. Returns the ID of the confirmation request that it answers.
    fn handle_line(
        &mut self,
        line: Result<Option<PluginView>, SourceError>,
    ) -> Result<Option<u64>, SourceError> {
        self.has_failed |= line.is_err();
        let Some(view) = line? else { return Ok(None) };
        let confirms = view.confirms;
        self.take_view(view);
        Ok(confirms)
    }

    /// Returns the present view; `None` if it equals the last one returned or if it is too early for the
    /// first view.
    fn view(&mut self, now: Instant) -> Option<Registrations> {
        let statement = self.statement.as_ref()?;
        if self.last_view.is_none() && self.assembler.has_pending() {
            let since = *self.first_names.get_or_insert(now);
            if now < since + FIRST_NAMES {
                return None;
            }
        }
        let view = self.assembler.view(statement);
        if !self.has_failed && self.last_view.as_ref() == Some(&view) {
            return None;
        }
        self.has_failed = false;
        self.last_view = Some(view.clone());
        Some(view)
    }
}

impl Source for PluginSource {
    async fn next(&mut self) -> Result<Registrations, SourceError> {
        loop {
            let lookup = self.assembler.start_lookups();
            let first_view =
                self.first_names.filter(|_| self.last_view.is_none()).map(|since| since + FIRST_NAMES);
            let never = Instant::now() + Duration::from_secs(3600);
            let due = [lookup, first_view].into_iter().flatten().fold(never, Instant::min);
            tokio::select! {
                line = self.connection.next_view() => { self.handle_line(line)?; }
                () = self.assembler.changed() => {}
                () = sleep_until(due) => {}
            }
            if let Some(view) = self.view(Instant::now()) {
                return Ok(view);
            }
        }
    }

    /// Asks the program to read its registry again, and waits for the view that answers the request.
    async fn confirm(&mut self, services: &BTreeSet<ServiceName>) -> Result<Registrations, SourceError> {
        self.confirmations += 1;
        let id = self.confirmations;
        self.connection.send(protocol::confirm(id, services)).await?;
        loop {
            let line = self.connection.next_view().await;
            if self.handle_line(line)? == Some(id) {
                let now = self.view(Instant::now());
                return now.or_else(|| self.last_view.clone()).ok_or_else(|| SourceError::Suspect {
                    source_name: self.name.clone(),
                    suspicion: "its names are still looked up".to_owned(),
                });
            }
        }
    }
}

#[cfg(test)]
mod tests;
