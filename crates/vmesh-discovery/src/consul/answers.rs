//! What is learnt of each answer: the list of services of a datacenter, and the instances of a service.
//!
//! An answer that cannot be believed asks the leader next; one that cannot be used keeps what was known.

use super::*;

impl<R: Resolve> ConsulSource<R> {
    /// Takes the cursor's word on an answer; `false`: it is not to be believed.
    pub(super) fn believe(
        cursor: &mut Cursor,
        meta: &Meta,
        was_strong: bool,
        max_stale: Duration,
        now: Instant,
        counters: &Counters,
    ) -> bool {
        let mut resets = 0;
        let verdict = cursor.took(meta, was_strong, max_stale, now, &mut resets);
        counters.index_resets.fetch_add(resets, Ordering::Relaxed);
        match verdict {
            Verdict::Doubtful(doubt) => {
                tracing::debug!("{doubt}: the leader is asked");
                false
            }
            Verdict::News | Verdict::Same => {
                counters.answered_now();
                true
            }
        }
    }

    pub(super) fn heard_catalog(
        &mut self,
        at: usize,
        answer: Result<Answer<Option<Names>>, ConsulError>,
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
                dc.cursor.failed(now);
                let failure = chain(&error);
                return self.catalog_failed(at, failure, error.into());
            }
        };
        let seen = dc.cursor.seen();
        if !Self::believe(&mut dc.cursor, &meta, was_strong, max_stale, now, &self.counters) {
            return Ok(());
        }
        let has_moved = seen > 0 && dc.cursor.seen() != seen;
        let mut difference = ListDifference::default();
        dc.filtered = meta.filtered;
        match value {
            Some(names) if names.is_empty() => {
                dc.empty = true;
                // It has to be looked at again, also if it stays as it is: nothing was learnt.
                dc.cursor.failed(now);
                return self.catalog_empty(at);
            }
            Some(names) => {
                dc.empty = false;
                difference = self.list(at, names, now);
            }
            None if dc.empty => {
                dc.cursor.failed(now);
                return self.catalog_empty(at);
            }
            None => {}
        }
        self.follow_list(at, &difference, has_moved, now);
        let Some(dc) = self.plan.datacenters.get_mut(at) else { return Ok(()) };
        if dc.failure.take().is_some() {
            self.plan.unpark(at);
            self.judge_all();
        }
        Ok(())
    }

    /// A datacenter of which nothing can be said. If that is all of them, the source has failed.
    pub(super) fn catalog_failed(
        &mut self,
        at: usize,
        failure: String,
        cause: Box<dyn std::error::Error + Send + Sync>,
    ) -> Result<(), SourceError> {
        let refused =
            cause.downcast_ref::<ConsulError>().is_some_and(|e| matches!(e.kind, ErrorKind::Forbidden(_)));
        let hint = if refused { format!(" ({RIGHTS})") } else { String::new() };
        let of = self.shown(at);
        if let Some(dc) = self.plan.datacenters.get_mut(at) {
            dc.in_flight = false;
            let failure = format!("Consul does not list the services{of}{hint}: {failure}");
            dc.failure = Some(failure.into());
        }
        self.judge_all();
        if self.plan.datacenters.iter().all(|dc| dc.failure.is_some()) {
            self.has_failed = true;
            let what = format!("list the services{of}{hint}");
            return Err(SourceError::Failed { source_name: self.name.clone(), what, cause });
        }
        Ok(())
    }

    /// Not even itself: no Consul is like that, but this is what it says to whoever has no rights.
    pub(super) fn catalog_empty(&mut self, at: usize) -> Result<(), SourceError> {
        let of = self.shown(at);
        let what = format!(
            "Consul lists no service{of}, not even itself: it answers so if the token may not read. {RIGHTS}; see \
             `token_file`, and `consul acl token read -self`"
        );
        if let Some(dc) = self.plan.datacenters.get_mut(at) {
            dc.failure = Some(what.as_str().into());
        }
        self.judge_all();
        if self.plan.datacenters.iter().all(|dc| dc.failure.is_some()) {
            self.has_failed = true;
            return Err(SourceError::Suspect { source_name: self.name.clone(), what });
        }
        Ok(())
    }

    /// ` of dc1`, where it is one of those that were named.
    pub(super) fn shown(&self, at: usize) -> String {
        let name = self.plan.datacenters.get(at).and_then(|dc| dc.name.as_ref());
        name.map(|name| format!(" of `{name}`")).unwrap_or_default()
    }

    /// Takes note of the services of a datacenter.
    pub(super) fn list(&mut self, at: usize, names: Names, now: Instant) -> ListDifference {
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
                        "{wrong}; this service is left out, `services.exclude` takes it off this list"
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
        let mut changed = self.plan.list(at, listed, problems, now);
        self.count_kept();
        if is_first {
            for name in self.hidden(at) {
                self.plan.watch_hidden(at, &name, now);
                changed.push(name);
            }
        }
        if self.plan.datacenters.iter().all(|dc| dc.has_listed) {
            // What none of them lists is gone: it is not to come back from before a restart when it cannot be read.
            let plan = &self.plan;
            let gone = self.last_good.extract_if(.., |name, _| !plan.watches(name));
            changed.extend(gone.map(|(name, _)| name));
        }
        for name in changed {
            self.judge(&name);
        }
        let all_read = self.plan.services.values().all(|watched| watched.read.is_some());
        self.assembler.want(self.statement.services.values(), !all_read);
        self.settle(now);
        difference
    }

    /// The services that were known before a restart and are not listed, where the token may not see everything.
    pub(super) fn hidden(&self, at: usize) -> Vec<ServiceName> {
        let Some(dc) = self.plan.datacenters.get(at).filter(|dc| dc.filtered) else { return Vec::new() };
        let was_here = |registration: &Registration| {
            let of = dc.name.as_ref().filter(|_| self.plan.datacenters.len() > 1);
            of.is_none_or(|dc| remembered(registration, dc).listed > 0)
        };
        let is_hidden = |(name, registration): &(&ServiceName, &Arc<Registration>)| {
            !self.plan.services.contains_key(&(at, (*name).clone()))
                && self.config.services.has(name.as_str())
                && was_here(registration)
        };
        self.last_good.iter().filter(is_hidden).map(|(name, _)| name.clone()).collect()
    }

    pub(super) fn heard_service(&mut self, key: &Key, answer: ServiceAnswer, was_strong: bool, now: Instant) {
        let max_stale = self.pace.max_stale;
        // It may be one that is not listed any more.
        let Some(watched) = self.plan.services.get_mut(key) else { return };
        let had_failure = watched.failure.is_some();
        let answer = match answer {
            Ok(answer) if is_outdated(&watched.cursor, &answer) => {
                watched.cursor.start_over(now);
                return;
            }
            Ok(answer) => answer,
            Err(error) => {
                watched.cursor.failed(now);
                watched.failures += 1;
                // One may be a server that goes: the next has taken over by the second.
                if watched.failures > 1 || watched.read.is_none() {
                    watched.failure = Some(chain(&error).into());
                    self.judge(&key.1);
                    self.settle(now);
                }
                return;
            }
        };
        let seen = watched.cursor.seen();
        if !Self::believe(&mut watched.cursor, &answer.meta, was_strong, max_stale, now, &self.counters) {
            return;
        }
        let must_be_newer = std::mem::take(&mut watched.must_be_newer);
        if must_be_newer && answer.value.is_none() && watched.cursor.seen() == seen && !was_strong {
            // The server that answered has not heard of the change that another one showed.
            watched.cursor.ask_leader();
            return;
        }
        watched.failures = 0;
        let was_empty = watched.empties;
        let is_empty = match &answer.value {
            Some(read) => read.listed == 0,
            None => watched.empties > 0,
        };
        if is_empty {
            watched.empties += 1;
            if !watched.listed && !answer.meta.filtered {
                // Nothing was kept from us: it is gone.
                self.plan.forget(key);
                self.count_kept();
                self.judge(&key.1);
                self.settle(now);
                return;
            }
            if was_empty == 0 && watched.listed && !answer.meta.filtered {
                watched.cursor.start_over(now + EMPTY_AGAIN);
                return;
            }
            let where_it_is = if watched.listed { "lists it" } else { "hides something from this token" };
            let why: Arc<str> = format!("Consul {where_it_is}, and shows no instance of it: {RIGHTS}").into();
            // It is looked at again, and not waited for: nothing was learnt.
            watched.cursor.failed(now);
            if watched.failure.as_ref() != Some(&why) {
                watched.failure = Some(why);
                self.judge(&key.1);
                self.settle(now);
            }
            return;
        }
        watched.empties = 0;
        let had_bytes = watched.read.as_ref().map_or(0, |read| read.bytes);
        if let Some(read) = &answer.value
            && (self.kept_bytes + read.bytes).saturating_sub(had_bytes) > self.max_kept
        {
            let why = format!(
                "Consul's answers have more than {} bytes together, which is more than is kept: see what its services \
                 register (`services.include` chooses those that are wanted)",
                self.max_kept
            );
            watched.cursor.refused(now);
            watched.failure = Some(why.into());
            self.judge(&key.1);
            self.settle(now);
            return;
        }
        if let Some(read) = &answer.value {
            self.kept_bytes = (self.kept_bytes + read.bytes).saturating_sub(had_bytes);
        }
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
            self.judge(&key.1);
            self.settle(now);
        }
    }

    /// Counts the bytes of what is kept anew, after services were forgotten.
    pub(super) fn count_kept(&mut self) {
        let reads = self.plan.services.values().filter_map(|watched| watched.read.as_ref());
        self.kept_bytes = reads.map(|read| read.bytes).sum();
    }
}

/// Whether an answer was found to be as before, and what was before is not what is known now: something else was read
/// while it was waited for.
fn is_outdated<T>(cursor: &Cursor, answer: &Answer<Option<T>>) -> bool {
    answer.value.is_none() && cursor.hash() != Some(answer.meta.hash)
}
