//! Merges the answers of all datacenters into the statement of the source about each service.
//!
//! A service that could not be read keeps its last good state. The first view waits until every service was
//! read or has failed.

use super::*;

/// The answers of all datacenters about one service.
#[derive(Default)]
struct ServiceReads {
    /// The instances in each datacenter, as last read or as known before a restart.
    reads: Vec<Arc<ServiceInstances>>,
    /// The reason why an answer is missing or outdated.
    stale_because: Option<Arc<str>>,
    /// Some datacenter was neither read nor known before a restart.
    is_unread: bool,
}

impl<R: Resolve> ConsulSource<R> {
    pub(super) fn schedule_view(&mut self, now: Instant) {
        self.view_at.get_or_insert(now + SETTLE);
    }

    pub(super) fn update_all_services(&mut self) {
        let mut names: BTreeSet<ServiceName> =
            self.plan.services.keys().map(|(_, name)| name.clone()).collect();
        names.extend(self.last_good.keys().cloned());
        for name in names {
            self.update_service(&name);
        }
        self.schedule_view(Instant::now());
    }

    /// Updates the statement about one service, at the cost of that service alone.
    pub(super) fn update_service(&mut self, name: &ServiceName) {
        let (statement, problems) = self.merge_service(name);
        match statement {
            Some(statement) => {
                self.assembler.request_names([&statement], true);
                self.statement.services.insert(name.clone(), statement);
            }
            None => {
                self.statement.services.remove(name);
                self.parsed.remove(name);
            }
        }
        if problems.is_empty() {
            self.problems.remove(name);
        } else {
            self.problems.insert(name.clone(), problems);
        }
    }

    /// Merges the answers of all datacenters into the statement about one service. Returns its problems, too.
    pub(super) fn merge_service(&mut self, name: &ServiceName) -> (Option<ServiceStatement>, Vec<Problem>) {
        self.unusable.remove(name);
        self.left_out.remove(name);
        let restored = self.last_good.get(name).cloned();
        let ServiceReads { reads, mut stale_because, is_unread } =
            self.collect_reads(name, restored.as_ref());
        if reads.is_empty() {
            return match is_unread {
                true => self.merge_unread(name, restored, stale_because),
                false => (None, Vec::new()),
            };
        }
        let read: Vec<&ServiceInstances> = reads.iter().map(|read| &**read).collect();
        let parsed = combine(&self.name, name, &read);
        let mut problems = parsed.problems;
        if let Some(because) = &stale_because {
            problems.push(self.problem_of(name, format!("{because}; the last good state stays in force")));
        }
        let before = self.parsed.get(name).cloned();
        let content = match parsed.services.into_iter().next() {
            Some(service) if service.endpoints.is_empty() => return (None, problems),
            Some(service) => match before {
                Some(before) if *before == service => ServiceContent::Parsed(before),
                _ => {
                    let service = Arc::new(service);
                    self.parsed.insert(name.clone(), service.clone());
                    ServiceContent::Parsed(service)
                }
            },
            None => {
                let unusable = "Consul's answer about this service is unusable, see the problems";
                stale_because.get_or_insert_with(|| unusable.into());
                match (before, restored) {
                    (Some(before), _) => ServiceContent::Parsed(before),
                    (None, Some(restored)) => ServiceContent::Restored(restored),
                    (None, None) => {
                        let why = problems.first().map_or(unusable, |problem| problem.message.as_str());
                        self.left_out.insert(name.clone(), format!("service `{name}`: {why}").into());
                        return (None, problems);
                    }
                }
            }
        };
        let partial_because = match &content {
            ServiceContent::Parsed(service) => service.partial_because.clone(),
            ServiceContent::Restored(_) => None,
        };
        (Some(ServiceStatement { content, stale_because, partial_because }), problems)
    }

    /// Collects what each datacenter answered about a service. `restored` is its registration from before a restart,
    /// used for datacenters that have not been read since.
    fn collect_reads(&self, name: &ServiceName, restored: Option<&Arc<Registration>>) -> ServiceReads {
        let mut all = ServiceReads::default();
        for (at, dc) in self.plan.datacenters.iter().enumerate() {
            let watched = self.plan.services.get(&(at, name.clone()));
            let failure = watched.and_then(|watched| watched.failure.as_ref()).or(dc.failure.as_ref());
            match watched.map(|watched| watched.read.clone()) {
                Some(Some(read)) => all.reads.push(read),
                // The catalogue of this datacenter was read, and the service is not in it.
                None if dc.has_listed => continue,
                _ => {
                    let known = restored.zip(dc.name.as_ref()).filter(|_| self.plan.datacenters.len() > 1);
                    match known {
                        Some((registration, dc)) => {
                            all.reads.push(Arc::new(restored_instances(registration, dc)))
                        }
                        None => all.is_unread = true,
                    }
                    if restored.is_none() && watched.is_none() {
                        continue;
                    }
                    let waiting = "Consul has not answered about this service since the start";
                    all.stale_because
                        .get_or_insert_with(|| failure.cloned().unwrap_or_else(|| waiting.into()));
                }
            }
            if let Some(failure) = failure {
                all.stale_because.get_or_insert_with(|| failure.clone());
            }
        }
        all
    }

    /// Returns the statement about a service that no datacenter has answered about since the start.
    fn merge_unread(
        &mut self,
        name: &ServiceName,
        restored: Option<Arc<Registration>>,
        stale_because: Option<Arc<str>>,
    ) -> (Option<ServiceStatement>, Vec<Problem>) {
        let statement = restored.map(|restored| ServiceStatement {
            content: ServiceContent::Restored(restored),
            stale_because: stale_because.clone(),
            partial_because: None,
        });
        let has_failed = self.plan.datacenters.iter().enumerate().any(|(at, _)| {
            self.plan.services.get(&(at, name.clone())).is_some_and(|watched| watched.failure.is_some())
        });
        let mut problems = Vec::new();
        if let (true, Some(because)) = (has_failed, stale_because) {
            if statement.is_none() {
                self.unusable.insert(name.clone(), format!("service `{name}`: {because}").into());
            }
            let outcome = match statement.is_some() {
                true => "the last good state stays in force",
                false => "there is no last good state",
            };
            problems.push(self.problem_of(name, format!("{because}; {outcome}")));
        }
        (statement, problems)
    }

    fn problem_of(&self, name: &ServiceName, message: String) -> Problem {
        Problem::new(Place::file(format!("{}/{name}", self.name)), subject_of(name), message)
    }

    /// Reports whether a datacenter has neither been read nor known before a restart.
    pub(super) fn is_unknown(&self, dc: &Datacenter) -> bool {
        let was_in =
            |name: &Arc<str>| self.last_good.values().any(|known| restored_instances(known, name).listed > 0);
        !dc.has_listed && !dc.name.as_ref().is_some_and(was_in)
    }

    /// Reports whether the first view may be built. Returns an error if no listed service can be read.
    pub(super) fn is_ready(&mut self, now: Instant) -> Result<bool, SourceError> {
        if self.last_view.is_some() {
            return Ok(true);
        }
        let answered = |dc: &Datacenter| dc.has_listed || dc.failure.is_some();
        if !self.plan.datacenters.iter().all(answered)
            || !self.plan.datacenters.iter().any(|dc| dc.has_listed)
        {
            return Ok(false);
        }
        if now < self.started + FIRST_DATACENTERS
            && self.plan.datacenters.iter().any(|dc| self.is_unknown(dc))
        {
            return Ok(false);
        }
        let mut failure = None;
        for watched in self.plan.services.values() {
            match (&watched.read, &watched.failure) {
                (Some(_), _) => {}
                (None, Some(because)) => failure = Some(because.clone()),
                (None, None) => return Ok(false),
            }
        }
        if let Some(because) = failure
            && self.plan.services.values().all(|watched| watched.read.is_none())
        {
            self.has_failed = true;
            let suspicion = format!("no service that Consul lists can be read: {because}");
            return Err(SourceError::Suspect { source_name: self.name.clone(), suspicion });
        }
        if self.assembler.has_pending() {
            let since = *self.first_names.get_or_insert(now);
            return Ok(now >= since + FIRST_NAMES);
        }
        Ok(true)
    }

    /// Returns the present view; `None` if it equals the last one returned or if it is too early for the
    /// first view.
    pub(super) fn view(&mut self, now: Instant) -> Result<Option<Registrations>, SourceError> {
        if self.plan.datacenters.iter().all(|dc| dc.failure.is_some()) || !self.is_ready(now)? {
            return Ok(None);
        }
        self.statement.problems = self.all_problems();
        self.statement.unusable = self.unusable.values().cloned().collect();
        self.statement.left_out = self.left_out.values().cloned().collect();
        let view = self.assembler.view(&self.statement);
        if !self.has_failed && self.last_view.as_ref() == Some(&view) {
            return Ok(None);
        }
        self.has_failed = false;
        self.last_view = Some(view.clone());
        Ok(Some(view))
    }

    pub(super) fn all_problems(&self) -> Vec<Problem> {
        let of_all =
            |message: String| Problem::new(Place::file(self.name.clone()), self.name.clone(), message);
        let mut problems: Vec<_> = self.problems.values().flatten().cloned().collect();
        for dc in &self.plan.datacenters {
            problems.extend(dc.problems.iter().cloned());
            if let Some(failure) = &dc.failure {
                problems.push(of_all(failure.to_string()));
            }
        }
        problems.extend(self.client.warnings().iter().map(ToString::to_string).map(of_all));
        problems.extend(self.lateness_problem().map(of_all));
        problems
    }
}
