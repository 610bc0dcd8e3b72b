//! Handles the answers of Consul: the list of services of a datacenter, and the instances of a service.
//!
//! After an implausible answer the leader is asked next; an unusable answer leaves the known state in place.

use super::*;

impl<R: Resolve> ConsulSource<R> {
    /// Passes an answer to `cursor`. Returns `false` if the cursor rejects it.
    pub(super) fn accept_answer(
        cursor: &mut Cursor,
        meta: &Meta,
        was_strong: bool,
        max_stale: Duration,
        now: Instant,
        counters: &Counters,
    ) -> bool {
        let mut resets = 0;
        let verdict = cursor.on_answer(meta, was_strong, max_stale, now, &mut resets);
        counters.index_resets.fetch_add(resets, Ordering::Relaxed);
        match verdict {
            Verdict::Doubtful(doubt) => {
                tracing::debug!("{doubt}; asking the leader");
                false
            }
            Verdict::Changed | Verdict::Unchanged => {
                counters.record_answer();
                true
            }
        }
    }

    pub(super) fn handle_catalog(
        &mut self,
        at: usize,
        answer: Result<Answer<Option<CatalogNames>>, ConsulError>,
        was_strong: bool,
        now: Instant,
    ) -> Result<(), SourceError> {
        let max_stale = self.pace.max_stale;
        let Some(dc) = self.plan.datacenters.get_mut(at) else { return Ok(()) };
        dc.in_flight = false;
        let Answer { value, meta } = match answer {
            Ok(answer) if is_outdated(&dc.cursor, &answer) => {
                dc.cursor.start_over(now);
                return Ok(());
            }
            Ok(answer) => answer,
            Err(error) => {
                dc.cursor.on_failure(now);
                let failure = chain(&error);
                return self.catalog_failed(at, failure, error.into());
            }
        };
        let last_index = dc.cursor.last_index();
        if !Self::accept_answer(&mut dc.cursor, &meta, was_strong, max_stale, now, &self.counters) {
            return Ok(());
        }
        let has_moved = last_index > 0 && dc.cursor.last_index() != last_index;
        let mut difference = ListDifference::default();
        dc.filtered = meta.filtered;
        match value {
            Some(names) if names.is_empty() => {
                dc.empty = true;
                // The query has to be sent again even if the index does not change, because nothing was
                // learnt.
                dc.cursor.on_failure(now);
                return self.catalog_empty(at);
            }
            Some(names) => {
                dc.empty = false;
                difference = self.take_list(at, names, now);
            }
            None if dc.empty => {
                dc.cursor.on_failure(now);
                return self.catalog_empty(at);
            }
            None => {}
        }
        self.handle_list_changes(at, &difference, has_moved, now);
        let Some(dc) = self.plan.datacenters.get_mut(at) else { return Ok(()) };
        if dc.failure.take().is_some() {
            self.plan.requeue_all(at);
            self.update_all_services();
        }
        Ok(())
    }

    /// Records that a datacenter cannot be read. Fails the source if no datacenter can be read.
    pub(super) fn catalog_failed(
        &mut self,
        at: usize,
        failure: String,
        cause: Box<dyn std::error::Error + Send + Sync>,
    ) -> Result<(), SourceError> {
        let refused =
            cause.downcast_ref::<ConsulError>().is_some_and(|e| matches!(e.kind, ErrorKind::Forbidden(_)));
        let hint = if refused { format!(" ({RIGHTS})") } else { String::new() };
        let of = self.datacenter_suffix(at);
        if let Some(dc) = self.plan.datacenters.get_mut(at) {
            dc.in_flight = false;
            let failure = format!("Consul does not list the services{of}{hint}: {failure}");
            dc.failure = Some(failure.into());
        }
        self.update_all_services();
        if self.plan.datacenters.iter().all(|dc| dc.failure.is_some()) {
            self.has_failed = true;
            let action = format!("list the services{of}{hint}");
            return Err(SourceError::Failed { source_name: self.name.clone(), action, cause });
        }
        Ok(())
    }

    /// Records that a catalogue lists nothing. Consul always lists itself, so the token probably lacks
    /// rights.
    pub(super) fn catalog_empty(&mut self, at: usize) -> Result<(), SourceError> {
        let of = self.datacenter_suffix(at);
        let suspicion = format!(
            "Consul lists no service{of}, not even itself, which it does for a token without read rights: \
             {RIGHTS}; see `token_file`, and `consul acl token read -self`"
        );
        if let Some(dc) = self.plan.datacenters.get_mut(at) {
            dc.failure = Some(suspicion.as_str().into());
        }
        self.update_all_services();
        if self.plan.datacenters.iter().all(|dc| dc.failure.is_some()) {
            self.has_failed = true;
            return Err(SourceError::Suspect { source_name: self.name.clone(), suspicion });
        }
        Ok(())
    }

    /// Returns ` of dc1` for a configured datacenter, or an empty string.
    pub(super) fn datacenter_suffix(&self, at: usize) -> String {
        let name = self.plan.datacenters.get(at).and_then(|dc| dc.name.as_ref());
        name.map(|name| format!(" of `{name}`")).unwrap_or_default()
    }

    /// Takes the list of services of a datacenter.
    pub(super) fn take_list(&mut self, at: usize, names: CatalogNames, now: Instant) -> ListDifference {
        let is_first = self.plan.datacenters.get(at).is_some_and(|dc| !dc.has_listed);
        let mut listed: BTreeMap<ServiceName, Arc<str>> = BTreeMap::new();
        let mut problems = Vec::new();
        let mut all_tags = BTreeMap::new();
        for (spelling, tags) in names {
            let lower = spelling.to_lowercase();
            if !self.config.services.has(&lower) || !self.rules.may_want(tags.as_deref().unwrap_or_default())
            {
                continue;
            }
            match lower.parse::<ServiceName>() {
                Ok(name) => {
                    let mut tags = tags.unwrap_or_default();
                    tags.sort_unstable();
                    all_tags.insert(name.clone(), self.hash_keys.hash_one(tags));
                    _ = listed.entry(name).or_insert_with(|| spelling.into());
                }
                Err(wrong) => {
                    let place = Place::file(self.name.clone());
                    let message = format!(
                        "{wrong}; this service is left out; add it to `services.exclude` to hide this problem"
                    );
                    problems.push(Problem::new(place, self.name.clone(), message));
                }
            }
        }
        let difference = match self.plan.datacenters.get_mut(at) {
            Some(dc) => {
                let before = std::mem::replace(&mut dc.tags, all_tags);
                ListDifference::between(&before, &dc.tags)
            }
            None => ListDifference::default(),
        };
        let mut changed = self.plan.take_list(at, listed, problems, now);
        self.recount_kept_bytes();
        if is_first {
            for name in self.hidden_services(at) {
                self.plan.watch_hidden(at, &name, now);
                changed.push(name);
            }
        }
        if self.plan.datacenters.iter().all(|dc| dc.has_listed) {
            // A service that no datacenter lists is gone. Its state from before the restart must not return
            // when it later cannot be read.
            let plan = &self.plan;
            let gone = self.last_good.extract_if(.., |name, _| !plan.is_watched(name));
            changed.extend(gone.map(|(name, _)| name));
        }
        for name in changed {
            self.update_service(&name);
        }
        let all_read = self.plan.services.values().all(|watched| watched.read.is_some());
        self.assembler.request_names(self.statement.services.values(), !all_read);
        self.schedule_view(now);
        difference
    }

    /// Returns the services from before a restart that are not listed, if the token may not see everything.
    pub(super) fn hidden_services(&self, at: usize) -> Vec<ServiceName> {
        let Some(dc) = self.plan.datacenters.get(at).filter(|dc| dc.filtered) else { return Vec::new() };
        let was_here = |registration: &Registration| {
            let of = dc.name.as_ref().filter(|_| self.plan.datacenters.len() > 1);
            of.is_none_or(|dc| restored_instances(registration, dc).listed > 0)
        };
        let is_hidden = |(name, registration): &(&ServiceName, &Arc<Registration>)| {
            !self.plan.services.contains_key(&(at, (*name).clone()))
                && self.config.services.has(name.as_str())
                && was_here(registration)
        };
        self.last_good.iter().filter(is_hidden).map(|(name, _)| name.clone()).collect()
    }

    pub(super) fn handle_service(
        &mut self,
        key: &ServiceKey,
        answer: ServiceAnswer,
        was_strong: bool,
        now: Instant,
    ) {
        let max_stale = self.pace.max_stale;
        // The service may no longer be listed.
        let Some(watched) = self.plan.services.get_mut(key) else { return };
        let had_failure = watched.failure.is_some();
        let answer = match answer {
            Ok(answer) if is_outdated(&watched.cursor, &answer) => {
                watched.cursor.start_over(now);
                return;
            }
            Ok(answer) => answer,
            Err(error) => return self.service_failed(key, &error, now),
        };
        let last_index = watched.cursor.last_index();
        if !Self::accept_answer(&mut watched.cursor, &answer.meta, was_strong, max_stale, now, &self.counters)
        {
            return;
        }
        let must_be_newer = std::mem::take(&mut watched.must_be_newer);
        if must_be_newer && answer.value.is_none() && watched.cursor.last_index() == last_index && !was_strong
        {
            // The server that answered has not yet seen a change that another server reported.
            watched.cursor.ask_leader();
            return;
        }
        watched.failures = 0;
        let is_empty = match &answer.value {
            Some(read) => read.listed == 0,
            None => watched.empty_answers > 0,
        };
        if is_empty {
            return self.handle_no_instances(key, answer.meta.filtered, now);
        }
        watched.empty_answers = 0;
        if answer.value.as_ref().is_some_and(|read| !self.count_kept_bytes(key, read, now)) {
            return;
        }
        let Some(watched) = self.plan.services.get_mut(key) else { return };
        watched.failure = None;
        let is_news = match answer.value {
            Some(read) if watched.read.as_deref() == Some(&read) => false,
            Some(read) => {
                watched.read = Some(Arc::new(read));
                true
            }
            None => false,
        };
        if is_news || had_failure {
            self.update_service(&key.1);
            self.schedule_view(now);
        }
    }

    /// Records that a service could not be read.
    fn service_failed(&mut self, key: &ServiceKey, error: &ConsulError, now: Instant) {
        let Some(watched) = self.plan.services.get_mut(key) else { return };
        watched.cursor.on_failure(now);
        watched.failures += 1;
        // A single failure may be a server that restarts: by the second, another server has taken over.
        if watched.failures > 1 || watched.read.is_none() {
            watched.failure = Some(chain(error).into());
            self.update_service(&key.1);
            self.schedule_view(now);
        }
    }

    /// Handles an answer without instances. `is_filtered`: the token may not see everything. If Consul lists the
    /// service nevertheless, the known instances stay in use.
    fn handle_no_instances(&mut self, key: &ServiceKey, is_filtered: bool, now: Instant) {
        let Some(watched) = self.plan.services.get_mut(key) else { return };
        let is_first = watched.empty_answers == 0;
        watched.empty_answers += 1;
        if !watched.listed && !is_filtered {
            // The answer is unfiltered, so the service really has no instances.
            self.plan.forget(key);
            self.recount_kept_bytes();
            self.update_service(&key.1);
            self.schedule_view(now);
            return;
        }
        if is_first && watched.listed && !is_filtered {
            watched.cursor.start_over(now + EMPTY_AGAIN);
            return;
        }
        let reason = if watched.listed { "lists this service" } else { "hides something from this token" };
        let why: Arc<str> = format!("Consul {reason} and shows none of its instances: {RIGHTS}").into();
        // The query is retried with a back-off instead of blocking, because nothing was learnt.
        watched.cursor.on_failure(now);
        if watched.failure.as_ref() != Some(&why) {
            watched.failure = Some(why);
            self.update_service(&key.1);
            self.schedule_view(now);
        }
    }

    /// Counts the bytes of `read` in place of those of the service's previous answer. Rejects the answer and returns
    /// `false` if all answers together would have too many bytes.
    fn count_kept_bytes(&mut self, key: &ServiceKey, read: &ServiceInstances, now: Instant) -> bool {
        let Some(watched) = self.plan.services.get_mut(key) else { return false };
        let had_bytes = watched.read.as_ref().map_or(0, |read| read.bytes);
        let kept_bytes = (self.kept_bytes + read.bytes).saturating_sub(had_bytes);
        if kept_bytes <= self.max_kept {
            self.kept_bytes = kept_bytes;
            return true;
        }
        let why = format!(
            "Consul's answers have more than {} bytes together, which is the limit: choose the services \
             to read with `services.include`, or register less",
            self.max_kept
        );
        watched.cursor.on_rejected(now);
        watched.failure = Some(why.into());
        self.update_service(&key.1);
        self.schedule_view(now);
        false
    }

    /// Counts the bytes of all answers that are kept, after services were removed.
    pub(super) fn recount_kept_bytes(&mut self) {
        let reads = self.plan.services.values().filter_map(|watched| watched.read.as_ref());
        self.kept_bytes = reads.map(|read| read.bytes).sum();
    }
}

/// Reports whether the answer equals an earlier body that is no longer the known one, because another read
/// ended while this answer was awaited.
fn is_outdated<T>(cursor: &Cursor, answer: &Answer<Option<T>>) -> bool {
    answer.value.is_none() && cursor.hash() != Some(answer.meta.hash)
}
