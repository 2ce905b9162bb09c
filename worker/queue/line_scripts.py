"""Lua scripts of `worker.queue.line`: who is next, and what each job costs its caller.

This is stride scheduling with the start-time tags of Goyal, Vin and Cheng (SIGCOMM 1996). The first
job of each waiting caller has a tag, and the job with the smallest tag is next. The tag of the
caller's next job is larger by work / weight. The tag of the last job taken is the virtual time: a
caller that begins to wait gets a tag no smaller than this, so that nobody saves up a right to many
jobs in a row.

KEYS[1] is the hash `line`: virtual time by priority, and `passed`, the number of interactive jobs
taken since the last batch job while batch jobs waited. KEYS[2] is the list of the RQ queue of
interactive jobs without a caller. The names of the other keys are derived from these:

    line:PRIORITY         sorted set: caller whose jobs wait -> tag of its first job
    line:left:PRIORITY    sorted set: caller whose jobs do not wait -> tag of its next job, if that
                          is later than the virtual time
    line:since:PRIORITY   sorted set: caller -> time since which its first job has been the first
    line:bell             list of tokens, on which idle workers wait
"""

COMMON = """
local line, base = KEYS[1], KEYS[2]
local function time()
  local now = redis.call('time')
  return now[1] + now[2] / 1e6
end
local function list(priority, caller)
  if priority == 'interactive' and caller == '' then return base end
  return base .. ':' .. priority .. ':' .. caller
end
local function virtual(priority)
  return tonumber(redis.call('hget', line, priority) or '0')
end
local function score(key, caller)
  local value = redis.call('zscore', key, caller)
  return value and tonumber(value)
end
local function renew(priority, ttl)
  redis.call('expire', line, ttl)
  for _, kind in ipairs({':', ':left:', ':since:'}) do
    redis.call('expire', line .. kind .. priority, ttl)
  end
end
local function cost(job)
  local fields = redis.call('hmget', job, 'work', 'weight')
  return (tonumber(fields[1] or '') or 1) / (tonumber(fields[2] or '') or 1)
end
local function join(priority, caller, refund)
  local tag, now = score(line .. ':' .. priority, caller), virtual(priority)
  if not tag or redis.call('llen', list(priority, caller)) <= 1 then
    tag = math.max(now, tag or now, score(line .. ':left:' .. priority, caller) or now)
    redis.call('zadd', line .. ':since:' .. priority, time(), caller)
  end
  redis.call('zadd', line .. ':' .. priority, tag - refund, caller)
  redis.call('zrem', line .. ':left:' .. priority, caller)
end
local function leave(priority, caller, tag)
  redis.call('zrem', line .. ':' .. priority, caller)
  redis.call('zrem', line .. ':since:' .. priority, caller)
  redis.call('srem', 'rq:queues', list(priority, caller))
  if tag > virtual(priority) then
    redis.call('zadd', line .. ':left:' .. priority, tag, caller)
  end
end
local function charge(priority, caller, tag, job)
  tag = tag + cost(job)
  if redis.call('exists', list(priority, caller)) == 0 then
    leave(priority, caller, tag)
  else
    redis.call('zadd', line .. ':' .. priority, tag, caller)
    redis.call('zadd', line .. ':since:' .. priority, time(), caller)
  end
  if priority == 'batch' then
    redis.call('hset', line, 'passed', 0)
  elseif redis.call('exists', line .. ':batch') == 1 then
    redis.call('hincrby', line, 'passed', 1)
  end
end
"""

JOIN = (
    COMMON
    + """
local priority, caller, taken, ttl = unpack(ARGV)
join(priority, caller, taken == '' and 0 or cost(taken))
renew(priority, ttl)
local bell = line .. ':bell'
redis.call('lpush', bell, '1')
redis.call('ltrim', bell, 0, 63)
redis.call('expire', bell, 60)
"""
)
"""After a push to a caller's list: let the caller wait, and wake a worker.

ARGV: priority, caller, key of the job's record if it was put back at the front (its caller gets
back what it cost) or an empty string, seconds until the keys expire.
"""

TAKE = (
    COMMON
    + """
local job_prefix, every, ttl, worker = unpack(ARGV)
if redis.call('hget', worker, 'drained') then return 'drained' end
local function first(priority)
  while true do
    local entry = redis.call('zrange', line .. ':' .. priority, 0, 0, 'withscores')
    if not entry[1] then return end
    local tag = tonumber(entry[2])
    if redis.call('exists', list(priority, entry[1])) == 1 then return entry[1], tag end
    leave(priority, entry[1], tag)
  end
end
if redis.call('exists', base) == 1 and not score(line .. ':interactive', '') then
  join('interactive', '', 0)
end
local priority = 'interactive'
local caller, tag = first('interactive')
local other, other_tag = first('batch')
if other and (not caller or tonumber(redis.call('hget', line, 'passed') or '0') >= every - 1) then
  priority, caller, tag = 'batch', other, other_tag
end
if not caller then return end
local key = list(priority, caller)
local id = redis.call('lpop', key)
redis.call('hset', line, priority, math.max(virtual(priority), tag))
redis.call('zremrangebyscore', line .. ':left:' .. priority, '-inf', virtual(priority))
charge(priority, caller, tag, job_prefix .. id)
renew(priority, ttl)
return {key, id}
"""
)
"""Take the next job: returns the key of its list and its id, nothing if no job waits, or 'drained'.

ARGV: prefix of the keys of job records, one in how many jobs is a batch job, seconds until the keys
expire, key of the worker's record.
"""

CLAIM = (
    COMMON
    + """
local job_prefix, priority, caller, id = unpack(ARGV)
if redis.call('lrem', list(priority, caller), 1, id) == 0 then return 0 end
local tag = score(line .. ':' .. priority, caller) or virtual(priority)
charge(priority, caller, tag, job_prefix .. id)
return 1
"""
)
"""Take a job out of its turn, as part of a worker's batch; returns 0 if it does not wait any more.

ARGV: prefix of the keys of job records, priority, caller, id of the job.
"""
