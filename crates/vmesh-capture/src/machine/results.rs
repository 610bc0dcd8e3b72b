//! The results of actions: each leads from the phase that awaited it to the next step.

use std::time::Instant;

use super::Machine;
use super::messages::{Event, LogLevel};
use super::states::Phase;

impl Machine {
    /// Handles the result that `phase` awaits. Any other event changes nothing.
    pub(super) fn handle_result(&mut self, phase: Phase, event: Event, now: Instant) {
        match (phase, event) {
            (Phase::ReadingHost, Event::HostRead(host)) => self.remember_host(*host, now),
            (Phase::ReadingHostAgain, Event::HostRead(host)) => {
                self.remember_host((*host).clone(), now);
                self.start_attempt(*host, true, now);
            }
            (Phase::ReadingSessions(purpose), Event::SessionsRead(sessions)) => {
                self.handle_sessions(purpose, sessions);
            }
            (Phase::Saving(purpose), Event::Saved(result)) => self.handle_saved(purpose, result),
            (Phase::CheckingListeners, Event::ListenersChecked(result)) => {
                self.refuse_confirmation_on_error(result);
            }
            (Phase::TryingPath(purpose), Event::PathTried(result)) => {
                self.handle_path_result(purpose, result)
            }
            (Phase::ReadingFilterForPath(purpose), Event::FilterRead(rules)) => {
                self.filter.set_rules(rules);
                let result = self.check_tracking();
                self.finish_path_check(purpose, result);
            }
            (phase, event) => self.handle_attempt_result(phase, event, now),
        }
    }

    /// Handles the results of the steps of an attempt.
    fn handle_attempt_result(&mut self, phase: Phase, event: Event, now: Instant) {
        match (phase, event) {
            (Phase::Detecting(attempt), Event::Detected(result)) => match result {
                Ok(backend) => {
                    self.backend = Some(backend);
                    self.continue_attempt(*attempt, now);
                }
                Err(why) => self.fail_attempt(*attempt, why),
            },
            (Phase::ReadingFilter(attempt), Event::FilterRead(rules)) => {
                self.filter.set_rules(rules);
                self.compile(*attempt, now);
            }
            (Phase::TakingFootprint(next), Event::FootprintTaken(result)) => {
                self.save_footprint(next, result);
            }
            (Phase::SavingFootprint(next), Event::Saved(result)) => {
                self.finish_saving_footprint(next, result);
            }
            (Phase::CheckingEnvoy(goal), Event::EnvoyChecked(well)) => self.apply(goal, well),
            (Phase::Applying { goal, before, well }, Event::Applied(applied)) => {
                self.finish_apply(*goal, before, well, applied, now);
            }
            (Phase::CleaningOtherBackends(attempt), Event::OtherBackendsCleaned(result)) => match result {
                Ok(()) => self.report.error = None,
                Err(why) => self.fail_attempt(*attempt, why),
            },
            (Phase::CountingConnections(attempt), Event::ConnectionsCounted(open)) => {
                self.begin_removal(attempt, open, now);
            }
            (
                Phase::CleaningOtherBackendsFirst { attempt, program, open },
                Event::OtherBackendsCleaned(result),
            ) => match result {
                Ok(()) => self.drain_or_remove(attempt, program, open),
                Err(why) => self.fail_attempt(*attempt, why),
            },
            (Phase::Draining { attempt, program, open }, Event::Applied(applied)) => {
                self.finish_draining(*attempt, program, open, applied);
            }
            (Phase::RemovingRules(attempt), Event::RulesRemoved(result)) => {
                self.finish_removal(*attempt, result);
            }
            (Phase::SavingRemoval, Event::Saved(result)) => {
                if let Err(why) = result {
                    self.log(LogLevel::Warn, why);
                }
            }
            (phase, event) => {
                self.phase = phase;
                self.log(LogLevel::Error, format!("ignored an event out of turn: {event:?}"));
            }
        }
    }
}
