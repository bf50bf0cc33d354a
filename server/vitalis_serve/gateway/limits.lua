-- The rules of limits.py, counted in Redis, with the same results. Everything that is said to Redis about limits is
-- said by this one script; what it does is ARGV[1].
--
-- KEYS: for each subject its account (numbers in FORMAT: see `open`) and a sorted set: who holds something, by the end
-- of its lease. A holder is called NAME:TOKENS, with the tokens reserved for it, so that whoever finds a lease
-- at its end knows what to give back. Settling or releasing what is not held does nothing, so it may be said twice.
-- Time is this Redis', in seconds since EPOCH (floats of Unix time would be too coarse), so no host's clock matters.

local EPOCH, DAY, MINUTE, EPSILON, BUDGETS_KEPT = 1767225600, 86400, 60, 1e-7, 33 * 86400
local FORMAT = '<dddddddddddd'
local inf, floor, ceil, max, min = math.huge, math.floor, math.ceil, math.max, math.min
local call = redis.call
local clock = call('TIME')
local now = tonumber(clock[1]) - EPOCH + tonumber(clock[2]) / 1000000

-- calendar: days since 1970-01-01 -> year * 12 + month - 1, UTC
local function month_of(day)
  local since = day + 719468  -- 0000-03-01
  local era = floor(since / 146097)
  local of_era = since - era * 146097
  local year = floor((of_era - floor(of_era / 1460) + floor(of_era / 36524) - floor(of_era / 146096)) / 365)
  local from_march = floor((5 * (of_era - 365 * year - floor(year / 4) + floor(year / 100)) + 2) / 153)
  return (year + era * 400) * 12 + from_march + 2
end
-- end of calendar

local today = floor(tonumber(clock[1]) / DAY)
local this_month = month_of(today)

local said = {}
local function say(...)
  for _, value in ipairs({...}) do
    said[#said + 1] = type(value) == 'number' and string.format('%.17g', value) or value
  end
end

-- A period that the clock was set back to does not begin again, unless the clock had been far ahead.
local function is_over(period, current)
  return period < current or period > current + 1
end

local function open(i)
  local one = {key = KEYS[2 * i - 1], held = KEYS[2 * i]}
  local kept = call('GET', one.key)
  if kept then
    one.requests_full, one.requests_cost, one.tokens_full, one.tokens_cost, one.reserved, one.day, one.day_spent,
      one.month, one.month_spent, one.hold, one.keep, one.swept = struct.unpack(FORMAT, kept)
  else
    one.requests_full, one.requests_cost, one.tokens_full, one.tokens_cost, one.reserved = now, 0, now, 0, 0
    one.day, one.day_spent, one.month, one.month_spent, one.hold, one.keep, one.swept = 0, 0, 0, 0, 0, 0, -inf
  end
  if is_over(one.day, today) then one.day, one.day_spent = today, 0 end
  if is_over(one.month, this_month) then one.month, one.month_spent = this_month, 0 end
  return one
end

-- When a bucket will be full under another limit, of which no more is left than was under the old.
local function moved(full, cost, limit)
  if full <= now or cost == 0 or limit == inf then return now end
  return now + MINUTE - min(limit, (now + MINUTE - full) / cost) * (MINUTE / limit)
end

-- Five limits, in the order of Rates, from ARGV[at] on; empty for none.
local function allow(one, at)
  local requests, tokens = tonumber(ARGV[at]) or inf, tonumber(ARGV[at + 1]) or inf
  if one.requests_cost ~= MINUTE / requests or one.tokens_cost ~= MINUTE / tokens then
    one.requests_full, one.requests_cost = moved(one.requests_full, one.requests_cost, requests), MINUTE / requests
    one.tokens_full, one.tokens_cost = moved(one.tokens_full, one.tokens_cost, tokens), MINUTE / tokens
    one.is_other = true
  end
  one.requests_room = requests < inf and MINUTE - one.requests_cost + EPSILON or inf
  one.tokens_room = tokens < inf and MINUTE - EPSILON or inf
  one.concurrent_limit = tonumber(ARGV[at + 2]) or inf
  one.day_limit, one.month_limit = tonumber(ARGV[at + 3]) or inf, tonumber(ARGV[at + 4]) or inf
end

-- For so many seconds: until its buckets are full and nothing is in flight, when a new one would be the same but for
-- what was spent.
local function save(one, seconds)
  one.keep = max(one.keep, seconds)
  local packed = struct.pack(FORMAT, one.requests_full, one.requests_cost, one.tokens_full, one.tokens_cost,
    max(0, one.reserved), one.day, one.day_spent, one.month, one.month_spent, one.hold, one.keep, one.swept)
  call('SET', one.key, packed, 'EX', ceil(max(one.keep, one.tokens_full - now + MINUTE)))
end

local function kept_for(one, lease)
  return (one.day_limit < inf or one.month_limit < inf) and BUDGETS_KEPT or lease + MINUTE
end

local function hold(one, lease, holder)
  return call('ZADD', one.held, now + lease, holder)
end

local function tokens_of(holder)
  return tonumber(string.match(holder, ':(%d+)$')) or 0
end

-- Ends leases of gateways that were killed, once a second. What their requests used, the ledger will tell.
local function sweep(one)
  if now - one.swept < 1 and now >= one.swept then return end
  one.swept = now
  local ended = call('ZRANGEBYSCORE', one.held, '-inf', now, 'LIMIT', 0, 1000)
  if #ended == 0 then return end
  for _, holder in ipairs(ended) do one.reserved = max(0, one.reserved - tokens_of(holder)) end
  -- First what Redis allows when it is full; after that it allows the rest.
  call('ZREM', one.held, unpack(ended))
  save(one, 0)
end

-- [2] holder, [3] its tokens, [4] by when it is wanted, [5] seconds of the lease, [6] on: each subject's limits
-- -> "late", or "yes" and of each subject 2 figures, or "no" and of each subject 7; the time is always second
local function reserve()
  if now > tonumber(ARGV[4]) then return say('late', now) end
  local tokens, lease, fits, all = tonumber(ARGV[3]), tonumber(ARGV[5]), true, {}
  for i = 1, #KEYS / 2 do
    local one = open(i)
    allow(one, 5 * i + 1)
    sweep(one)
    one.concurrent = one.concurrent_limit < inf and call('ZCARD', one.held) or 0
    if one.requests_full - now > one.requests_room or one.tokens_full - now >= one.tokens_room
      or one.concurrent >= one.concurrent_limit
      or one.reserved + one.day_spent >= one.day_limit or one.reserved + one.month_spent >= one.month_limit then
      fits = false
    end
    all[i] = one
  end
  say(fits and 'yes' or 'no', now)
  for _, one in ipairs(all) do
    if fits then
      hold(one, lease, ARGV[2])
      call('EXPIRE', one.held, ceil(lease) + MINUTE)
      one.reserved = one.reserved + tokens
      one.requests_full = max(one.requests_full, now) + one.requests_cost
      one.tokens_full = max(one.tokens_full, now) + tokens * one.tokens_cost
      save(one, kept_for(one, lease))
      say(one.requests_full, one.tokens_full)
    else
      if one.is_other then save(one, kept_for(one, lease)) end
      say(one.requests_full, one.tokens_full, one.concurrent, one.reserved, one.day_spent, one.month_spent, one.hold)
    end
  end
end

-- What `change` does to each subject under which ARGV[2] is held. -> under how many
local function give_back(change)
  local found = 0
  for i = 1, #KEYS / 2 do
    if call('ZREM', KEYS[2 * i], ARGV[2]) == 1 then
      local one = open(i)
      one.reserved = one.reserved - tonumber(ARGV[3])
      change(one)
      save(one, 0)
      found = found + 1
    end
  end
  say(found, now)
end

-- [2] holder, [3] its tokens, [4] tokens that it used, [5] since when
local function settle()
  local used = tonumber(ARGV[4])
  local more = used - tonumber(ARGV[3])
  give_back(function(one)
    one.day_spent, one.month_spent = one.day_spent + used, one.month_spent + used
    one.hold = one.hold + (now - tonumber(ARGV[5]) - one.hold) * 0.125
    one.tokens_full = (more > 0 and max(one.tokens_full, now) or one.tokens_full) + more * one.tokens_cost
  end)
end

-- [2] holder, [3] its tokens
local function release()
  give_back(function(one)
    one.requests_full = one.requests_full - one.requests_cost
    one.tokens_full = one.tokens_full - tonumber(ARGV[3]) * one.tokens_cost
  end)
end

-- One subject: [2] seconds of the lease, [3] to [7] limits, [8] on: holders. -> how many were not known
-- Those are taken up again (this Redis lost its data, or could not be reached for longer than a lease): never refused,
-- and no debt.
local function renew()
  local lease, one, unknown = tonumber(ARGV[2]), open(1), 0
  allow(one, 3)
  for i = 8, #ARGV do
    if hold(one, lease, ARGV[i]) == 1 then
      local tokens, empty, full = tokens_of(ARGV[i]), now + MINUTE, max(one.requests_full, now)
      one.requests_full = max(full, min(full + one.requests_cost, empty))
      full = max(one.tokens_full, now)
      one.tokens_full = max(full, min(full + tokens * one.tokens_cost, empty))
      one.reserved, unknown = one.reserved + tokens, unknown + 1
    end
  end
  call('EXPIRE', one.held, ceil(lease) + MINUTE)
  save(one, kept_for(one, lease))
  say(unknown, now)
end

-- One subject: [2] days since 1970 and [3] tokens, [4] year * 12 + month - 1 and [5] tokens that the ledger of host [6]
-- has at least. Each host knows its own, so what all of them said is added up.
local function know()
  local one, day, month = open(1), 0, 0
  local hosts = KEYS[1] .. ':hosts'
  call('HSET', hosts, ARGV[6], table.concat({ARGV[2], ARGV[3], ARGV[4], ARGV[5]}, ' '))
  call('EXPIRE', hosts, BUDGETS_KEPT)
  for _, said_ in ipairs(call('HVALS', hosts)) do
    local of_day, in_day, of_month, in_month = string.match(said_, '(%d+) (%d+) (%d+) (%d+)')
    if tonumber(of_day) == one.day then day = day + tonumber(in_day) end
    if tonumber(of_month) == one.month then month = month + tonumber(in_month) end
  end
  one.day_spent, one.month_spent = max(one.day_spent, day), max(one.month_spent, month)
  save(one, BUDGETS_KEPT)
  say(1, now)
end

-- Can this Redis be written to?
local function probe()
  call('SET', KEYS[1], now, 'EX', MINUTE)
  say(1, now)
end

local acts = {reserve = reserve, settle = settle, release = release, renew = renew, know = know, probe = probe}
acts[ARGV[1]]()
return {ok = table.concat(said, ' ')}  -- a line is read more cheaply than a string with its length
